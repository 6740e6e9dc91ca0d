"""The README says what runs: its commands exist, its code compiles, its settings are settings, its files are there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from loramill.cli import app
from loramill.settings import Settings

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = sorted({line.partition("#")[0].strip() for line in re.findall(r"^\$ loramill (.+)$", README, re.MULTILINE)})
SETTINGS = re.findall(r"`([a-z_.]+)`", "".join(re.findall(r"^\| (`.*?) \|", README.partition("## Settings")[2], re.M)))


def test_there_is_something_to_check() -> None:
    assert len(COMMANDS) >= 7
    assert len(SETTINGS) >= 8


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_and_option_exists(command: str) -> None:
    words = shlex.split(command)
    nouns = [word for word in words if re.fullmatch(r"[a-z]+", word)]
    while nouns:
        shown = CliRunner().invoke(app, [*nouns, "--help"])
        if shown.exit_code == 0:
            break
        nouns.pop()  # the last word was an argument
    assert nouns, command
    for option in (word for word in words if word.startswith("--")):
        assert option in shown.output


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_setting_exists(setting: str) -> None:
    value: object = Settings()
    for name in setting.split("."):
        value = getattr(value, name)


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_the_code_compiles(code: str) -> None:
    compile(code, "README.md", "exec")


def test_every_file_it_names_is_there() -> None:
    named = re.findall(r"`((?:[\w-]+/)*[\w-]+\.(?:md|yaml|py))`", README)
    assert named
    for name in named:
        assert (ROOT / name).exists(), name
