"""Bad days of `loramill up`: one sentence that says what and how to mend, no traceback, nothing lost."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from loramill import local
from loramill.errors import Conflict, DiskFull
from loramill.registry import Registry, keys, migrate
from loramill.settings import Settings


def up(home: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LORAMILL_")}
    environment |= {"LORAMILL_HOME": str(home), **variables}
    command = [sys.executable, "-m", "loramill.cli", "up"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def one_sentence(ended: subprocess.CompletedProcess[str]) -> str:
    assert ended.returncode == 1
    assert "Traceback" not in ended.stdout + ended.stderr
    return " ".join(ended.stderr.split())


def test_a_taken_port(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = one_sentence(up(tmp_path, LORAMILL_SERVE__PORT=str(port)))
    assert str(port) in said
    assert "--port" in said


def test_a_broken_database_file_is_left_as_it_was(tmp_path: Path) -> None:
    broken = b"this is no database, but it may be somebody's" * 100
    (tmp_path / "loramill.db").write_bytes(broken)
    said = one_sentence(up(tmp_path))
    assert str(tmp_path / "loramill.db") in said
    assert (tmp_path / "loramill.db").read_bytes() == broken


def test_a_model_folder_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    said = one_sentence(up(tmp_path / "home", LORAMILL_BASE=str(tmp_path / "model")))
    assert str(tmp_path / "model") in said
    assert "config.json" in said


def test_a_home_that_can_not_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said = one_sentence(up(tmp_path / "file" / "home"))
    assert "LORAMILL_HOME" in said


def test_an_unknown_setting(tmp_path: Path) -> None:
    said = one_sentence(up(tmp_path, LORAMILL_SERVE__PROT="1"))
    assert "prot" in said.lower()


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "FREE_BYTES", 1 << 62)
    with pytest.raises(DiskFull, match="MiB free"):
        local.prepare_home(tmp_path / "home")


def test_a_home_that_is_in_use(tmp_path: Path) -> None:
    settings = Settings.load(home=tmp_path)
    with (
        local.hold_lock(settings),
        pytest.raises(Conflict, match=rf"process {os.getpid()}.*loramill down"),
        local.hold_lock(settings),
    ):
        pass
    assert local.down(settings) is False  # the lock went with its holder


def test_the_admin_key_stays_while_it_is_valid_and_is_replaced_when_it_is_not(tmp_path: Path) -> None:
    settings = Settings.load(home=tmp_path)
    migrate(settings.database)
    local.admin_key(settings)
    first = settings.admin_key_file.read_text()
    assert settings.admin_key_file.stat().st_mode & 0o777 == 0o600
    local.admin_key(settings)
    assert settings.admin_key_file.read_text() == first
    registry = Registry.open(settings.database, settings.artifacts)
    with registry.writing() as session:
        keys.revoke(session, keys.authenticate(session, first.strip()).id)
    local.admin_key(settings)
    assert settings.admin_key_file.read_text() != first
