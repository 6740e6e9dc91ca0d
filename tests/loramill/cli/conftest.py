"""An environment for commands: none of the user's settings, and the tests' gateway where a test asks for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from ..conftest import RunningGateway, examples
from .running import clear_settings, use_gateway


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An environment without settings, whose gateway address refuses connections."""
    clear_settings(monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORAMILL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("LORAMILL_URL", "http://127.0.0.1:9")


@pytest.fixture
def running_gateway(clean: None, gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch) -> RunningGateway:
    """The gateway that commands call, with the admin's key."""
    use_gateway(monkeypatch, gateway)
    return gateway


@pytest.fixture
def train(tmp_path: Path) -> str:
    """A file of examples."""
    path = tmp_path / "train.jsonl"
    path.write_bytes(examples())
    return str(path)
