"""Runs a function in a background process."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from loramill.errors import LoramillError, SetupError

_READY = "ready"


@dataclass(frozen=True, slots=True)
class BackgroundProcess:
    """A background process; `output` is the file of its stdout and stderr."""

    pid: int
    output: Path
    _pipe: int

    def wait_ready(self) -> None:
        """Waits until the process is ready; an interrupt ends it.

        Raises:
            SetupError: The process ended before it was ready; the message gives the reason.
        """
        try:
            with os.fdopen(self._pipe, encoding="utf-8") as pipe:
                message = pipe.read()  # until the process closes the pipe or ends
        except KeyboardInterrupt:
            os.kill(self.pid, signal.SIGTERM)
            raise
        if message != _READY:
            raise SetupError(message or f"The process ended without an error message; its output is in {self.output}.")


def start(run: Callable[[Callable[[], None]], None], output: Path) -> BackgroundProcess:
    """Runs `run` in a forked process with its own session, which outlives this terminal.

    It must be called before any thread is started. `run` calls its argument when it is ready.
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        _child_main(run, output, writing)
    os.close(writing)
    return BackgroundProcess(pid, output, reading)


def _child_main(run: Callable[[Callable[[], None]], None], output: Path, pipe: int) -> NoReturn:
    """Runs in the background process; does not return."""
    status, open_ = 1, True

    def report(text: str) -> None:
        nonlocal open_
        if open_:
            open_ = False
            os.write(pipe, text.encode())
            os.close(pipe)

    try:
        os.setsid()
        for stream, path, flags in (
            (0, os.devnull, os.O_RDONLY),
            (1, output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
        ):
            opened = os.open(path, flags, 0o600)
            os.dup2(opened, stream)
            os.close(opened)
        os.dup2(1, 2)
        run(lambda: report(_READY))
        status = 0
    except LoramillError as error:
        sys.stderr.write(f"{error.message}\n")
        report(error.message)
    except BaseException:  # noqa: BLE001 - this process ends here, and its traceback belongs in its output
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
