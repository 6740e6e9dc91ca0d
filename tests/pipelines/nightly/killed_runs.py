"""A process that starts nightly runs, each in a fork of it, so that one can be killed at any of its points.

The forks are not made by the process of the tests: its other threads are missing in a fork, which waits forever for a
lock that one of them holds, or for the thread pool in which MinHash signatures are computed (256 rows and more).
"""

from __future__ import annotations

import faulthandler
import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest
from sqlalchemy import Engine, event

from loramill.data.tokenizer import ChatTokenizer
from loramill.errors import NightlyBusy
from loramill.models.catalog import find_base

from .simulation import Simulation, patch_runs

#: Exit status of a run that leaves the work to another one.
BUSY = 9
ROOT = Path(__file__).parents[3]


class RunStarter:
    """Starts runs of a simulation one by one, while the calling process is the pool that trains."""

    def __init__(self, simulation: Simulation) -> None:
        self._simulation = simulation
        command = [sys.executable, "-m", "tests.pipelines.nightly.killed_runs", simulation.settings.home]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)

    def __enter__(self) -> RunStarter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.kill()
        self._process.communicate()

    def run(self, kill_at: int | None = None, *, before_training: Callable[[], None] = lambda: None) -> int:
        """Runs until the end, or to the point that kills it; returns the exit status, which is negative for a kill."""
        line = self._tell(str(kill_at))
        while line == "train":
            before_training()
            self._simulation.train_queued()
            line = self._tell("trained")
        return int(line)

    def _tell(self, line: str) -> str:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()
        return self._process.stdout.readline().strip()


def start_runs(folder: Path) -> None:
    """Starts a run for each line of standard input, which is the point that kills it, and writes its exit status."""
    base = find_base("smollm2-135m", Path("~/.cache/loramill").expanduser())
    with pytest.MonkeyPatch.context() as patch:
        patch_runs(patch, base, ChatTokenizer.load(base.folder))
        for line in iter(sys.stdin.readline, ""):
            pid = os.fork()
            if pid == 0:
                faulthandler.dump_traceback_later(600, exit=True)  # a run that hangs shows where, and fails
                run(folder, None if line == "None\n" else int(line))
                os._exit(0)
            write_line(str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])))


def run(folder: Path, kill_at: int | None) -> None:
    """A run that is killed at one of its SQL statements, commits, and writes of artifacts, counted from 1."""
    points = itertools.count(1)

    def point(*_: object) -> None:
        if next(points) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    event.listen(Engine, "before_cursor_execute", point)
    event.listen(Engine, "commit", point)
    simulation = Simulation(folder)
    simulation.check = let_train
    put = simulation.registry.artifacts.put

    def put_or_die(files: Any) -> str:
        point()
        stored = put(files)
        point()
        return stored

    simulation.registry.artifacts.put = put_or_die  # type: ignore[method-assign]
    try:
        simulation.run()
    except NightlyBusy:
        os._exit(BUSY)
    (folder / "points").write_text(str(next(points)))


def let_train() -> None:
    """Lets the process of the tests train what is queued."""
    write_line("train")
    assert sys.stdin.readline() == "trained\n"


def write_line(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    start_runs(Path(sys.argv[1]))
