"""Locks between processes, by `flock` on a file; the kernel releases a lock when its process ends in any way."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


def wait_for_lock(file: IO[str] | int) -> None:
    """Locks an open file or descriptor; waits until it is free."""
    fcntl.flock(file, fcntl.LOCK_EX)


def try_lock(file: IO[str] | int) -> bool:
    """Locks an open file or descriptor if it is free; returns whether it was."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def exclusive_lock(path: Path) -> Iterator[None]:
    """Holds the lock of a file, which is created if needed, for the block; waits until it is free."""
    with path.open("w") as file:
        wait_for_lock(file)
        yield
