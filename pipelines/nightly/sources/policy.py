"""Decides whether a file of a source is read now: a pure function of what storage reports and of the last look."""

from __future__ import annotations

from enum import StrEnum

from loramill.types import SourceFileRecord

#: A file that changed less than these seconds ago may still be written.
SETTLE_SECONDS = 5.0


class FileAction(StrEnum):
    """What a scan does with a file."""

    READ = "read"
    WAIT = "wait"  # it may still be written
    SKIP = "skip"  # it was read in this state


def decide(state: str, modified: float | None, seen: SourceFileRecord | None, now: float) -> FileAction:
    """Decides about one file.

    Args:
        state: size and time or ETag of the file.
        modified: when it was last modified, in seconds since the epoch; None: storage does not report it. Without it,
            or if it is in the future, the file is read once two looks find the same state.
        seen: the last look.
        now: the time of this look.
    """
    if seen is not None and seen.settled and seen.state == state:
        return FileAction.SKIP
    if modified is None or modified > now:
        return FileAction.READ if seen is not None and seen.state == state else FileAction.WAIT
    return FileAction.READ if now - modified >= SETTLE_SECONDS else FileAction.WAIT
