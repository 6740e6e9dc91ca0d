"""A command in the background is ready or gives its reason; settings as a command shows them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from loramill.settings_origin import effective_settings

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
    started.wait()
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
            f"The process ended without a reason; its output is in {tmp_path / 'output'}.\n"
        )
    assert started(tmp_path, "breaks") and "ZeroDivisionError" in (tmp_path / "output").read_text()


def test_settings_show_where_they_come_from_and_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("LORAMILL_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loramill.toml").write_text(
        'artifacts_url = "s3://key:hidden@bucket/x?secret_access_key=hidden"\n[serve]\nport = 9000\nthreads = 2\n'
    )
    monkeypatch.setenv("LORAMILL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("LORAMILL_SERVE__PORT", "9001")
    monkeypatch.setenv("LORAMILL_JOBS", '{"sessions": 3}')
    monkeypatch.setenv("LORAMILL_DATABASE_URL", "postgresql+psycopg://me:hidden@db.example/mill?sslpassword=hidden")
    monkeypatch.setenv("LORAMILL_API_KEY", "lm-hidden")
    found = {each.name: each for each in effective_settings()}
    file = str(tmp_path / "loramill.toml")
    assert {name: (found[name].value, found[name].origin) for name in ("serve.port", "serve.threads", "base")} == {
        "serve.port": (9001, "LORAMILL_SERVE__PORT"),
        "serve.threads": (2, file),
        "base": ("smollm2-135m", "default"),
    }
    assert (found["jobs.sessions"].value, found["jobs.sessions"].origin) == (3, "LORAMILL_JOBS")
    assert found["database_url"].value == "postgresql+psycopg://me:…@db.example/mill?sslpassword=…"
    assert found["artifacts_url"].value == "s3://key:…@bucket/x?secret_access_key=…"
    assert found["url"].value == "http://127.0.0.1:9001"
    assert "hidden" not in " ".join(str(each.value) for each in found.values())
