"""The outermost middleware: request ids, counts, the access log, unexpected errors, the size of bodies."""

from __future__ import annotations

import logging
import re
import time
import uuid

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loramill.serve.api.errors import error_response, internal_error
from loramill.serve.api.generation.metrics import STATUS_DISCONNECTED
from loramill.serve.api.middleware import access_log
from loramill.serve.metrics import definitions as metrics

log = logging.getLogger("loramill.gateway")

#: Bytes of a JSON body; a long prompt is far below.
MAX_JSON_BYTES = 16 * 2**20


class RequestIdMiddleware:
    """Pure ASGI: gives each request an id, counts it and writes it to the access log."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id, began, status = f"req-{uuid.uuid4().hex}", time.perf_counter(), 0
        state = scope.setdefault("state", {})
        state["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        finally:
            # The router notes what it found; the path itself may be anything that a caller thinks of.
            endpoint = scope["route"].path if "route" in scope else "(none)"
            metrics.HTTP_REQUESTS.labels(endpoint, status or STATUS_DISCONNECTED).inc()
            caller = state.get("caller")
            access_log.log_request(
                request_id=request_id,
                tenant=caller and caller.tenant,
                method=scope["method"],
                path=scope["path"],
                status=status,
                seconds=time.perf_counter() - began,
            )


class InternalErrorMiddleware:
    """Pure ASGI: answers an unexpected error, with what every answer has (a request id, CORS headers)."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request."""
        begun = False

        async def noting(message: Message) -> None:
            nonlocal begun
            begun = begun or message["type"] == "http.response.start"
            await send(message)

        try:
            await self.app(scope, receive, noting)
        except Exception:
            if scope["type"] != "http":
                raise
            request_id = scope["state"]["request_id"]
            log.exception("request %s failed", request_id, extra={"request": request_id})
            if begun:  # cut the answer off, so that it isn't taken for complete
                raise
            await error_response(internal_error(request_id))(scope, receive, send)


class BodyLimitMiddleware:
    """Pure ASGI: stops reading a body that is larger than it may be, announced or not."""

    def __init__(self, app: ASGIApp, *, upload_paths: re.Pattern[str], max_upload_bytes: int) -> None:
        self.app = app
        self._upload_paths = upload_paths
        self._max_upload_bytes = max_upload_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lets a request through with a `receive` that counts."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        limit = self._max_upload_bytes if self._upload_paths.fullmatch(scope["path"]) else MAX_JSON_BYTES
        announced = next((int(value) for name, value in scope["headers"] if name == b"content-length"), 0)
        received = 0

        async def limited() -> Message:
            nonlocal received
            if announced > limit:
                raise _too_large(limit)
            message = await receive()
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                if received > limit:
                    raise _too_large(limit)
            return message

        await self.app(scope, limited, send)


def _too_large(limit: int) -> HTTPException:
    # The framework lets only its own exceptions through while it reads a body.
    return HTTPException(413, f"The body is larger than {limit / 2**20:g} MiB, the most that is taken; split it.")
