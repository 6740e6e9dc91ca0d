"""A background command is ready, or its error is reported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

#: Runs in its own process: forking pytest's would copy its threads.
SCRIPT = """
import os, sys
from pathlib import Path
from loramill.local import background
from loramill.errors import LoramillError, PortTaken

def run(ready):
    print("a line", flush=True)
    if sys.argv[2] == "fails":
        raise PortTaken("The port is taken.")
    if sys.argv[2] == "breaks":
        raise ZeroDivisionError
    if sys.argv[2] == "dies":
        os._exit(3)
    ready()
    ready()  # the cluster was started again
    Path(sys.argv[1], "session").write_text(f"{os.getsid(0)} {os.getpid()}")

started = background.start(run, Path(sys.argv[1], "output"))
try:
    started.wait_ready()
except LoramillError as error:
    print(error.message)
os.waitpid(started.pid, 0)
"""


def run_in_background(folder: Path, mode: str) -> str:
    command = [sys.executable, "-c", SCRIPT, str(folder), mode]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr == ""
    return done.stdout


def test_it_returns_when_the_command_is_ready(tmp_path: Path) -> None:
    assert run_in_background(tmp_path, "works") == ""
    session, pid = (tmp_path / "session").read_text().split()
    assert session == pid, "it would end with the terminal"
    assert (tmp_path / "output").read_text() == "a line\n"


def test_the_error_is_reported_if_the_command_ends_early(tmp_path: Path) -> None:
    assert run_in_background(tmp_path, "fails") == "The port is taken.\n"
    for mode in ("breaks", "dies"):
        assert run_in_background(tmp_path, mode) == (
            f"The process ended without an error message; its output is in {tmp_path / 'output'}.\n"
        )
    assert run_in_background(tmp_path, "breaks") and "ZeroDivisionError" in (tmp_path / "output").read_text()
