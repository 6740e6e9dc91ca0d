"""The catch-all error handler."""

from __future__ import annotations

import logging

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loramill.serve.api.errors import error_response, internal_error

log = logging.getLogger("loramill.gateway")


class InternalErrorMiddleware:
    """Logs an unexpected error and answers it with status 500.

    It is inside the middleware for request ids and CORS, so that its responses have their headers.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request."""
        response_started = False

        async def send_and_remember(message: Message) -> None:
            nonlocal response_started
            response_started = response_started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self.app(scope, receive, send_and_remember)
        except Exception:
            if scope["type"] != "http":
                raise
            request_id = scope["state"]["request_id"]
            log.exception("request %s failed", request_id, extra={"request": request_id})
            if response_started:  # the connection is cut, so that the response is not taken for complete
                raise
            await error_response(internal_error(request_id))(scope, receive, send)
