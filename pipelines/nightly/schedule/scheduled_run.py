"""A scheduled run in a process of its own, as the scheduler sees it. It imports nothing of the run itself."""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress

from loramill.pipelines.nightly.definition import NightlyDefinition
from loramill.settings import Settings

#: How long a process may take to end before it is killed; a killed run is resumed as well.
STOP_SECONDS = 5.0


class ScheduledRun:
    """A process that works on the open run."""

    def __init__(self, settings: Settings, definition: NightlyDefinition) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-u", "-m", "loramill.pipelines.nightly.schedule.process"], stdin=subprocess.PIPE
        )
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended already; its status is the reason
            for each in (settings, definition):
                self._process.stdin.write(each.model_dump_json().encode() + b"\n")
            self._process.stdin.flush()

    def poll(self) -> int | None:
        """Returns its exit status, or None while it works."""
        return self._process.poll()

    def stop(self) -> None:
        """Ends it."""
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
