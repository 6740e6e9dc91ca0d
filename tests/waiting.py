"""Waiting for a condition instead of a time: a slow machine makes a test slower, not red."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def eventually(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Returns once the condition holds; it is an error if it does not hold within `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.02)


@contextmanager
def in_thread(task: Callable[[], object]) -> Iterator[None]:
    """Runs a task in a thread, which has to end soon after the block."""
    # A daemon: if the test fails, its worker may retry for minutes on a database that is gone.
    thread = threading.Thread(target=task, daemon=True)
    thread.start()
    yield
    thread.join(120)
    assert not thread.is_alive()
