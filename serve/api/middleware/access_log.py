"""The access log: one JSON line per request, in `<home>/logs/access.log`; and the count of requests by status."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import time
from logging.handlers import WatchedFileHandler
from pathlib import Path

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loramill.serve.api.generation.metrics import STATUS_DISCONNECTED
from loramill.serve.metrics import definitions as metrics
from loramill.storage.locks import wait_for_lock

#: Receives the lines. Without a handler (`open_access_log`) they are dropped.
log = logging.getLogger("loramill.access")

#: The size in bytes at which the file is renamed to `access.log.1`: about 300,000 requests.
MAX_FILE_BYTES = 64 << 20
#: Seconds between two errors about a file that cannot be written.
ERROR_INTERVAL_SECONDS = 60.0

#: Paths that `up`, load balancers and kubelets request every few seconds; only failures are logged.
_PROBE_PATHS = ("/health", "/healthz", "/readyz")
_KEY_PATTERN = re.compile(r"lm-[\w-]+")


class AccessLogMiddleware:
    """Logs and counts each request when its response is complete."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started_at, status = time.perf_counter(), 0

        async def send_and_remember(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, send_and_remember)
        finally:
            # The route's pattern is counted, since the path itself may be any text.
            endpoint = scope["route"].path if "route" in scope else "(none)"
            metrics.HTTP_REQUESTS.labels(endpoint, status or STATUS_DISCONNECTED).inc()
            caller = scope["state"].get("caller")
            log_request(
                request_id=scope["state"]["request_id"],
                tenant=caller and caller.tenant,
                method=scope["method"],
                path=scope["path"],
                status=status,
                seconds=time.perf_counter() - started_at,
            )


def log_request(*, request_id: str, tenant: str | None, method: str, path: str, status: int, seconds: float) -> None:
    """Logs one request, unless it is a successful probe: no query, headers or body, and no API key in the path.

    Args:
        request_id: the response's `x-request-id`.
        tenant: the key's tenant; None: an admin key, or no key.
        method: the HTTP method.
        path: the URL's path.
        status: the response's status; 0: the client disconnected before the response.
        seconds: duration until the last byte of the response.
    """
    if not log.isEnabledFor(logging.INFO) or (path in _PROBE_PATHS and 200 <= status < 300):
        return
    now = time.time()
    line = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now * 1000) % 1000:03}Z",
        "request": request_id,
        "tenant": tenant,
        "method": method,
        "path": _KEY_PATTERN.sub("lm-…", path),
        "status": status,
        "ms": round(seconds * 1000, 1),
    }
    log.info("%s", json.dumps(line), extra={"request": request_id, "tenant": tenant, "status": status})


def open_access_log(folder: Path) -> None:
    """Makes this process write its access log to `access.log` in `folder`.

    Raises:
        OSError: the file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    log.addHandler(SharedLogFile(folder / "access.log"))
    log.setLevel(logging.INFO)
    log.propagate = False


class SharedLogFile(WatchedFileHandler):
    """Appends to a file that all gateways of this machine share. The gateway that fills it renames it."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, encoding="utf-8")
        self._reported = 0.0

    def emit(self, record: logging.LogRecord) -> None:
        """Writes a line. A failure does not affect the request; it is logged in the process's own log."""
        super().emit(record)
        if self.stream is not None and self.stream.tell() > MAX_FILE_BYTES:
            self._rotate(self.stream.fileno())

    def _rotate(self, file: int) -> None:
        wait_for_lock(file)  # until `emit` opens the new file
        path = Path(self.baseFilename)
        if path.exists() and os.path.samestat(path.stat(), os.fstat(file)):  # otherwise another gateway renamed it
            path.replace(f"{path}.1")

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """Logs at most once a minute why the file cannot be written."""
        if time.monotonic() - self._reported > ERROR_INTERVAL_SECONDS:
            self._reported = time.monotonic()
            logging.getLogger("loramill.gateway").error("%s can't be written: %s", self.baseFilename, sys.exc_info()[1])
