"""A command in the background is ready or gives its reason; settings as a command shows them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

#: Of a process of its own: pytest's would be forked with its threads.
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


def started(folder: Path, how: str) -> str:
    command = [sys.executable, "-c", SCRIPT, str(folder), how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr == ""
    return done.stdout


def test_it_returns_when_the_command_is_ready(tmp_path: Path) -> None:
    assert started(tmp_path, "works") == ""
    session, pid = (tmp_path / "session").read_text().split()
    assert session == pid, "it would end with the terminal"
    assert (tmp_path / "output").read_text() == "a line\n"


def test_the_reason_is_given_if_the_command_ends_early(tmp_path: Path) -> None:
    assert started(tmp_path, "fails") == "The port is taken.\n"
    for how in ("breaks", "dies"):
        assert started(tmp_path, how) == (
            f"The process ended without an error message; its output is in {tmp_path / 'output'}.\n"
        )
    assert started(tmp_path, "breaks") and "ZeroDivisionError" in (tmp_path / "output").read_text()
