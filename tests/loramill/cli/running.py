"""Commands run in this process, with the tests' gateway or without any settings."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from loramill.cli import app

from ..conftest import RunningGateway

#: The command in a process of its own.
COMMAND = [sys.executable, "-m", "loramill.cli"]


def clear_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Removes every LORAMILL_ variable from the environment."""
    for name in [*os.environ]:
        if name.startswith("LORAMILL_"):
            monkeypatch.delenv(name)


def use_gateway(monkeypatch: pytest.MonkeyPatch, gateway: RunningGateway) -> None:
    """Makes commands call the gateway with the admin's key, and nothing else set."""
    clear_settings(monkeypatch)
    monkeypatch.setenv("LORAMILL_HOME", str(gateway.home))
    monkeypatch.setenv("LORAMILL_URL", gateway.url)


def loramill(*arguments: str, stdin: str | None = None) -> Result:
    """Runs a command."""
    return CliRunner().invoke(app, arguments, input=stdin, catch_exceptions=False)


def ok(*arguments: str, stdin: str | None = None) -> Result:
    """Runs a command that must succeed."""
    ran = loramill(*arguments, stdin=stdin)
    assert ran.exit_code == 0, ran.output
    return ran


def json_output(*arguments: str) -> Any:
    """The JSON that a command prints with --json, and nothing else."""
    ran = ok(*arguments, "--json")
    assert ran.stderr == ""
    return json.loads(ran.stdout)
