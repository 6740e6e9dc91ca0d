"""The access log: one JSON line per request, in `<home>/logs/access.log`."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import time
from logging.handlers import WatchedFileHandler
from pathlib import Path

from loramill.storage.locks import wait_for_lock

#: The log's lines; without a handler (`open_file`) they are dropped.
log = logging.getLogger("loramill.access")

#: The size at which the file becomes `access.log.1`: some 300,000 requests.
MAX_FILE_BYTES = 64 << 20
#: Seconds between two errors about a file that can't be written.
ERROR_INTERVAL_SECONDS = 60.0

#: What `up`, load balancers and kubelets request every few seconds; only failures are logged.
_PROBE_PATHS = ("/health", "/healthz", "/readyz")
_KEY_PATTERN = re.compile(r"lm-[\w-]+")


def log_request(*, request_id: str, tenant: str | None, method: str, path: str, status: int, seconds: float) -> None:
    """Logs one request, unless it is a successful probe: no query, headers or body, and no key in the path.

    Args:
        request: its id, which is the answer's `x-request-id`.
        tenant: the key's tenant; None: an admin's key, or no key.
        status: the answer's; 0: the caller disconnected before.
        seconds: until the last byte of the answer.
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
        OSError: it can't be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    log.addHandler(SharedLogFile(folder / "access.log"))
    log.setLevel(logging.INFO)
    log.propagate = False


class SharedLogFile(WatchedFileHandler):
    """Appends to a file that all gateways of this machine share; the one that fills it moves it away."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, encoding="utf-8")
        self._reported = 0.0

    def emit(self, record: logging.LogRecord) -> None:
        """Writes a line; a failure does not affect the request, and is logged in the process's own log."""
        super().emit(record)
        if self.stream is not None and self.stream.tell() > MAX_FILE_BYTES:
            self._rotate(self.stream.fileno())

    def _rotate(self, file: int) -> None:
        wait_for_lock(file)  # until `emit` opens the new file
        path = Path(self.baseFilename)
        if path.exists() and os.path.samestat(path.stat(), os.fstat(file)):  # otherwise another gateway was first
            path.replace(f"{path}.1")

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """Logs once a minute why the file can't be written."""
        if time.monotonic() - self._reported > ERROR_INTERVAL_SECONDS:
            self._reported = time.monotonic()
            logging.getLogger("loramill.gateway").error("%s can't be written: %s", self.baseFilename, sys.exc_info()[1])
