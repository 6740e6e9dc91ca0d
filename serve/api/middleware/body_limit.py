"""The maximum size of request bodies."""

from __future__ import annotations

import re

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

#: Maximum size of a JSON body in bytes. Even long prompts are far below.
MAX_JSON_BYTES = 16 * 2**20


class BodyLimitMiddleware:
    """Rejects a body that is too large with status 413, by its announced size or as soon as too much was received.

    Args:
        upload_paths: paths that accept files.
        max_upload_bytes: maximum size of a body on these paths; elsewhere it is `MAX_JSON_BYTES`.
    """

    def __init__(self, app: ASGIApp, *, upload_paths: re.Pattern[str], max_upload_bytes: int) -> None:
        self.app = app
        self._upload_paths = upload_paths
        self._max_upload_bytes = max_upload_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on with a `receive` that counts bytes."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        limit = self._max_upload_bytes if self._upload_paths.fullmatch(scope["path"]) else MAX_JSON_BYTES
        announced = next((int(value) for name, value in scope["headers"] if name == b"content-length"), 0)
        received = 0

        async def receive_limited() -> Message:
            nonlocal received
            if announced > limit:
                raise _too_large(limit)
            message = await receive()
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                if received > limit:
                    raise _too_large(limit)
            return message

        await self.app(scope, receive_limited, send)


def _too_large(limit: int) -> HTTPException:
    # While it reads a body, the framework passes only its own exceptions on.
    return HTTPException(413, f"The request body exceeds the maximum of {limit / 2**20:g} MiB; split it.")
