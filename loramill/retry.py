"""Retries what fails only for now."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from loramill.errors import LoramillError, Unavailable

log = logging.getLogger(__name__)

T = TypeVar("T")


def retry_while_unavailable(
    operation: Callable[[], T],
    *,
    timeout_seconds: float,
    pause_seconds: float = 0.5,
    errors: tuple[type[LoramillError], ...] = (Unavailable,),
) -> T:
    """Returns what `operation` returns, and repeats it while it raises one of `errors`.

    The first attempt may have succeeded although its response was lost: `operation` must be safe to repeat.

    Args:
        timeout_seconds: how long to retry; an attempt that fails later raises its error.
        pause_seconds: pause between two attempts.
    """
    deadline, logged = time.monotonic() + timeout_seconds, False
    while True:
        try:
            return operation()
        except errors as error:
            if time.monotonic() > deadline:
                raise
            if not logged:
                log.warning("retrying for up to %.0f s: %s", timeout_seconds, error.message)
            logged = True
            time.sleep(pause_seconds)
