"""The command `loramill`: in this process, or in its own where exit codes and output streams matter."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from loramill.registry import nightly
from loramill.settings import Settings

from ..conftest import RunningGateway
from .running import COMMAND, json_output, loramill, ok

pytestmark = pytest.mark.usefixtures("clean")


def process(*arguments: str) -> subprocess.CompletedProcess[str]:
    # os.environ, not the process's own environment, into which pytest's readline puts a COLUMNS.
    return subprocess.run([*COMMAND, *arguments], env={**os.environ}, capture_output=True, text=True, check=False)


def test_from_tenant_to_answer(running_gateway: RunningGateway, train: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "key create walk" in ok("tenant", "create", "walk").stderr
    assert "walk" in [each["name"] for each in json_output("tenant", "list")]
    key = ok("key", "create", "walk").stdout.strip()
    monkeypatch.setenv("LORAMILL_API_KEY", key)
    submitted = ok("submit", "walk/support", "--train", train, "--steps", "4", "--lr", "0.01", "--targets", "q_proj")
    job = submitted.stdout.strip()
    assert job.startswith("ftjob-") and f"jobs events -f {job}" in submitted.stderr
    spec = json_output("jobs", "show", job)["spec"]
    assert (spec["steps"], spec["learning_rate"], spec["targets"]) == (4, 0.01, ["q_proj"])
    version = running_gateway.publish(job)
    assert version[:12] in ok("jobs").stdout
    assert "Published" in ok("jobs", "events", "-f", job).stdout
    assert [event["message"].split()[0] for event in json_output("jobs", "events", job)] == [
        "Queued.",
        "Attempt",
        "Published",
    ]
    assert ok("chat", "walk/support", "-m", "Hello [bold] you").stdout == "Hello [bold] you\n"
    assert ok("chat", "walk/support", stdin="from a pipe\n").stdout == "from a pipe\n"
    assert json_output("adapters")[0]["champion"] == version
    assert "champion" in ok("adapters", "show", "walk/support").stdout
    assert json_output("adapters", "show", "walk/support")["versions"][0]["id"] == version


def test_an_adapter_is_promoted_and_rolled_back(running_gateway: RunningGateway, tenant: str, train: str) -> None:
    name = f"{tenant}/a"
    first = running_gateway.publish(ok("submit", name, "--train", train).stdout.strip())
    second = running_gateway.publish(ok("submit", name, "--train", train, "--start-from", "champion").stdout.strip())
    assert second[:12] in ok("promote", name, "challenger").stderr
    assert json_output("adapters", "show", name)["champion"] == second
    assert first[:12] in ok("rollback", name).stderr
    assert "nightly run" in ok("data", "add", name, "--train", train).stderr
    with running_gateway.registry.reading() as session:
        assert name in [waiting.adapter for waiting in nightly.pending_data(session)]


def test_keys_are_listed_and_revoked(running_gateway: RunningGateway, tenant: str) -> None:
    made = json_output("key", "create", tenant)
    assert made["key"].endswith(made["hint"])
    ok("key", "revoke", made["id"])
    (listed,) = json_output("key", "list", tenant)
    assert listed["revoked_at"] is not None and "key" not in listed
    assert made["id"] in ok("key", "list", tenant).stdout


def test_an_empty_list_comes_with_the_command_to_begin(running_gateway: RunningGateway, tenant: str) -> None:
    for arguments in (["jobs", "--tenant", tenant], ["adapters", "--tenant", tenant], ["key", "list", tenant]):
        assert ok(*arguments).stdout == ""
        assert "`loramill " in ok(*arguments).stderr
        assert json_output(*arguments) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["jobs"], "Nothing answers at http://127.0.0.1:9: start it with `loramill up`, or set LORAMILL_URL."),
        (["submit", "noslash", "--train", "x"], "'noslash' is not an adapter name"),
        (["submit", "a/b", "--train", "[red]x"], "[red]x can't be read: No such file or directory."),
        (["nightly", "show"], "loramill up"),
        (["down"], ""),
    ],
)
def test_errors_are_one_line(arguments: list[str], message: str) -> None:
    ran = process(*arguments)
    assert ran.returncode == (1 if message else 0), ran.stderr
    assert ran.stdout == ""
    assert message in ran.stderr
    assert len(ran.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("file", "variable", "where"),
    [
        ("surprise = 1", {}, "surprise"),
        ("serve = ", {}, "loramill.toml"),
        ("[serve]\nport = 'x'", {}, "serve.port"),
        ("", {"LORAMILL_SURPRISE": "1"}, "LORAMILL_SURPRISE"),
        ("", {"LORAMILL_SERVE": "{"}, 'field "serve"'),
    ],
)
def test_invalid_settings_have_a_one_line_error(
    file: str, variable: dict[str, str], where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "loramill.toml").write_text(file)
    for name, value in variable.items():
        monkeypatch.setenv(name, value)
    ran = loramill("jobs")
    assert (ran.exit_code, ran.stdout) == (1, "")
    assert where in ran.stderr and len(ran.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["bogus"],
        ["submit", "a/b"],
        ["submit"],
        ["submit", "a/b", "--file", "x.toml"],
        ["submit", "a/b", "--rank", "x"],
        ["submit", "a/b", "--method", "magic"],
        ["jobs", "--json", "show"],
        ["up", "--port", "0"],
        ["jobs", "-n", "x"],
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    ran = loramill(*arguments)
    assert (ran.exit_code, ran.stdout) == (2, "")


def test_ctrl_c_is_quiet_and_exits_with_130(running_gateway: RunningGateway, tenant: str, train: str) -> None:
    job = ok("submit", f"{tenant}/a", "--train", train).stdout.strip()
    command = [*COMMAND, "jobs", "events", "-f", job]
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell starts background processes that ignore it
    with subprocess.Popen(command, stdout=-1, stderr=-1, text=True) as following:
        signal.signal(signal.SIGINT, before)
        assert following.stdout is not None and following.stderr is not None
        assert "Queued." in following.stdout.readline()
        following.send_signal(signal.SIGINT)
        try:
            assert following.wait(60) == 130
        finally:
            following.kill()
        assert following.stderr.read() == ""


def test_a_pipe_gets_complete_rows_without_color(running_gateway: RunningGateway, tenant: str, train: str) -> None:
    job = ok("submit", f"{tenant}/{'long' * 15}", "--train", train).stdout.strip()
    ran = process("jobs", "--tenant", tenant)
    assert "\x1b" not in ran.stdout
    (line,) = ran.stdout.splitlines()[1:]
    assert job in line and "long" * 15 in line and "queued" in line


def test_help_names_every_command() -> None:
    text = process("--help").stdout
    commands = "up down tenant key submit jobs adapters promote rollback data nightly chat doctor"
    assert [name for name in commands.split() if f" {name} " not in text] == []
    assert "loramill 0." in process("--version").stdout


def test_the_command_line_starts_without_heavy_packages() -> None:
    heavy = "torch ray transformers sqlalchemy openai datasets pandas pyarrow matplotlib plotext".split()
    script = f"import sys, loramill.cli; print(*({{*{heavy!r}}} & {{*sys.modules}}))"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == []


def test_options_of_up_override_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[Settings] = []

    def up(settings: Settings, *, console: Console) -> None:
        got.append(settings)

    monkeypatch.setenv("LORAMILL_SERVE__THREADS", "3")
    monkeypatch.setattr("loramill.local.up.up", up)
    ok("up", "--port", "8501", "--base", "elsewhere", "--sessions", "2")
    (settings,) = got
    assert (settings.serve.port, settings.serve.threads) == (8501, 3)
    assert (settings.base, settings.jobs.sessions) == ("elsewhere", 2)
