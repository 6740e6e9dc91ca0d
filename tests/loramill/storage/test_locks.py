"""Locks between processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from loramill.storage.locks import exclusive_lock, try_lock

HOLD = """
import sys
from pathlib import Path
from loramill.storage.locks import exclusive_lock

with exclusive_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_lock_is_free_once_its_process_was_killed(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with path.open() as file:
        assert not try_lock(file)
    holder.kill()
    holder.communicate()
    with exclusive_lock(path), path.open() as file:
        assert not try_lock(file)
    with path.open() as file:
        assert try_lock(file)
