"""The command `loramill`: in this process, or in its own where exit codes and output streams matter."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from loramill import errors
from loramill.cli.format import time_ago
from loramill.names import AdapterName
from loramill.registry import adapters, nightly, nightly_schedule
from loramill.settings import Settings
from loramill.types import ScheduledTime, StepStatus

from ..conftest import RunningGateway, examples
from .running import clear_settings, loramill, ok

COMMAND = [sys.executable, "-m", "loramill.cli"]


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An environment without settings, whose gateway address refuses connections."""
    clear_settings(monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORAMILL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("LORAMILL_URL", "http://127.0.0.1:9")


@pytest.fixture
def running_gateway(gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch) -> RunningGateway:
    """The gateway that commands call, with the admin's key."""
    monkeypatch.setenv("LORAMILL_HOME", str(gateway.home))
    monkeypatch.setenv("LORAMILL_URL", gateway.url)
    return gateway


def json_output(*arguments: str) -> Any:
    """The JSON that a command prints with --json, and nothing else."""
    ran = ok(*arguments, "--json")
    assert ran.stderr == ""
    return json.loads(ran.stdout)


def process(*arguments: str) -> subprocess.CompletedProcess[str]:
    # os.environ, not the process's own environment, into which pytest's readline puts a COLUMNS.
    return subprocess.run([*COMMAND, *arguments], env={**os.environ}, capture_output=True, text=True, check=False)


@pytest.fixture
def train(tmp_path: Path) -> str:
    path = tmp_path / "train.jsonl"
    path.write_bytes(examples())
    return str(path)


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


def test_waiting_shows_the_end(
    running_gateway: RunningGateway, tenant: str, train: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def publish(self: Any, job_id: str, *_: Any) -> Any:
        running_gateway.publish(job_id)
        return self.get(job_id)

    monkeypatch.setattr("loramill.client.jobs.JobsResource.wait", publish)
    assert f"loramill chat {tenant}/a@" in ok("submit", f"{tenant}/a", "--train", train, "--wait").stderr
    waited = ok("submit", f"{tenant}/a", "--train", train, "--wait", "--json")
    assert json.loads(waited.stdout)["status"] == "succeeded"


def test_waiting_for_a_job_that_fails_exits_with_1(running_gateway: RunningGateway, tenant: str, train: str) -> None:
    command = [*COMMAND, "submit", f"{tenant}/a", "--train", train, "--wait"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as waiting:
        assert waiting.stdout is not None and waiting.stderr is not None
        job = waiting.stdout.readline().strip()
        running_gateway.fail(job, errors.TrainingDiverged("The loss is NaN at step 3."))
        output = waiting.stderr.read()
    assert waiting.returncode == 1
    assert "The loss is NaN at step 3." in output and "Traceback" not in output


def test_jobs_are_listed_up_to_a_limit(running_gateway: RunningGateway, tenant: str, train: str) -> None:
    for _ in range(3):
        ok("submit", f"{tenant}/a", "--train", train)
    assert len(json_output("jobs", "--tenant", tenant)) == 3
    short = ok("jobs", "list", "--tenant", tenant, "-n", "2")
    assert len(short.stdout.splitlines()) == 3 and "more than 2" in short.stderr
    job = json_output("jobs", "--tenant", tenant)[0]["id"]
    (cancelled,) = json_output("jobs", "cancel", job)
    assert cancelled["status"] == "cancelled"
    refused = loramill("jobs", "cancel", job)
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert "already cancelled" in refused.stderr


def test_an_empty_list_comes_with_the_command_to_begin(running_gateway: RunningGateway, tenant: str) -> None:
    for arguments in (["jobs", "--tenant", tenant], ["adapters", "--tenant", tenant], ["key", "list", tenant]):
        assert ok(*arguments).stdout == ""
        assert "`loramill " in ok(*arguments).stderr
        assert json_output(*arguments) == []


def test_warnings_and_errors_of_data_are_reported(running_gateway: RunningGateway, tenant: str, tmp_path: Path) -> None:
    twice = tmp_path / "twice.jsonl"
    twice.write_bytes(examples() + examples(1))
    assert "Warning: " in ok("submit", f"{tenant}/a", "--train", str(twice)).stderr
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_bytes(b"[1]\n" + examples())
    ran = loramill("submit", f"{tenant}/a", "--train", str(wrong))
    assert ran.exit_code == 1 and "wrong.jsonl" in ran.stderr


def test_an_interactive_chat_remembers(
    running_gateway: RunningGateway, tenant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversations: list[list[dict[str, str]]] = []

    def stream(_: Any, model: str, conversation: Any, **sampling: Any) -> Any:
        conversations.append([*conversation])
        yield from ("to ", conversation[-1]["content"])

    lines = iter(["one", "two"])

    def typed(_: str) -> str:
        for line in lines:
            return line
        raise EOFError

    monkeypatch.setattr("loramill.client.Client.stream", stream)
    monkeypatch.setattr("loramill.cli.adapters.chat._is_interactive", lambda: True)
    monkeypatch.setattr("builtins.input", typed)
    assert ok("chat", "smollm2-135m", "--system", "Be short.").stdout == "to one\nto two\n\n"
    assert [message["content"] for message in conversations[-1]] == ["Be short.", "one", "to one", "two"]


def test_an_interactive_chat_survives_a_stopped_answer(
    running_gateway: RunningGateway, tenant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversations: list[list[str]] = []

    def stream(_: Any, model: str, conversation: Any, **sampling: Any) -> Any:
        conversations.append([message["content"] for message in conversation])
        assert sampling == {"temperature": 0.5, "top_p": 0.9}
        yield "so "
        if conversations[-1][-1] == "long":
            raise KeyboardInterrupt
        if conversations[-1][-1] == "much":
            raise errors.Overloaded("Too much at once.")
        yield "far"

    lines = iter(["/help", "long", "", "much", "one", "/clear", "two", "/bye", "never"])
    monkeypatch.setattr("loramill.client.Client.stream", stream)
    monkeypatch.setattr("loramill.cli.adapters.chat._is_interactive", lambda: True)
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    ran = ok("chat", "smollm2-135m", "--temperature", "0.5", "--top-p", "0.9")
    assert conversations == [["long"], ["long", "so ", "much"], ["long", "so ", "one"], ["two"]]
    assert "/clear" in ran.stderr and "Stopped" in ran.stderr and "Too much at once." in ran.stderr


def test_a_chat_without_gateway_and_key_is_refused_with_the_fix() -> None:
    ran = loramill("chat", "smollm2-135m", "-m", "Hello")
    assert ran.exit_code == 1
    assert "Nothing answers at http://127.0.0.1:9: start it with `loramill up`" in ran.stderr


def test_the_version_that_is_served_after_a_job_is_shown(
    running_gateway: RunningGateway, tenant: str, train: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wait(jobs: Any, job: str, *_: Any) -> Any:
        running_gateway.publish(job)
        return jobs.get(job)

    monkeypatch.setattr("loramill.client.jobs.JobsResource.wait", wait)
    arguments = ("submit", f"{tenant}/a", "--train", train)
    assert f"{tenant}/a answers with it." in ok(*arguments, "--wait").stderr
    output = ok(*arguments, "--wait", "--seed", "1").stderr
    assert f"{tenant}/a still answers with its champion" in output and f"`loramill promote {tenant}/a@" in output
    assert f"{tenant}/a answers with it." in ok(*arguments, "--promote", "--seed", "2").stderr


def test_ctrl_c_while_waiting_reports_that_the_job_continues(
    running_gateway: RunningGateway, tenant: str, train: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wait(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("loramill.client.jobs.JobsResource.wait", wait)
    ran = loramill("submit", f"{tenant}/a", "--train", train, "--wait")
    assert ran.exit_code == 130
    assert "The job continues; `loramill jobs cancel ftjob-" in ran.stderr


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


def test_a_wrong_target_is_refused_with_the_valid_ones(
    running_gateway: RunningGateway, tenant: str, train: str
) -> None:
    ran = loramill("submit", f"{tenant}/b", "--train", train, "--targets", "q_proj,nose")
    assert ran.exit_code == 1 and "nose" in ran.stderr and "down_proj" in ran.stderr


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


def test_the_last_nightly_run_is_shown(running_gateway: RunningGateway, tenant: str) -> None:
    name = AdapterName(tenant, "a")
    score = {"examples": 2, "exact_match": 0.5, "token_f1": 0.25}
    with running_gateway.registry.writing() as session:
        adapters.get_or_create(session, name)
        run = nightly.open_run(session).id
        slices = {"all": {"base": score, "challenger": {**score, "token_f1": 0.75}}}
        nightly.record_step(session, run, name, "evaluate", StepStatus.DONE, {"slices": slices, "results": "a" * 64})
        gate = {"verdict": "promote", "reason": "it gains 0.500"}
        nightly.record_step(session, run, name, "gate", StepStatus.DONE, gate)
        promoted = {"promoted": True, "verdict": "promote", "champion": "c"}
        nightly.record_step(session, run, name, "promote", StepStatus.DONE, promoted)
        nightly.finish_run(session, run)
        nightly.finish_run(session, nightly.open_run(session).id)  # a run without new data does not hide earlier ones
    output = ok("nightly", "show")
    assert output.stdout.splitlines()[1].split()[:7] == [str(name), "token", "f1", "0.250", "-", "0.750", "promoted"]
    assert output.stderr.splitlines()[-1] == "Nightly run: 1 promoted."  # other tests leave rollouts
    found = json_output("nightly", "show")
    assert {step["step"] for step in found["steps"]} == {"evaluate", "gate", "promote"}
    assert found["adapters"][0]["verdict"] == "promoted" and found["id"] == run


def test_the_definition_of_nightly_runs_is_checked_and_shown(running_gateway: RunningGateway, tenant: str) -> None:
    with running_gateway.registry.writing() as session:
        adapters.get_or_create(session, AdapterName(tenant, "support"))
    file = running_gateway.home / "nightly.yaml"
    assert "does not exist" in ok("nightly", "status").stdout
    file.write_text(f"schedule: {{timezone: Europe/Berlin}}\nadapters: {tenant}/*\nbudget: {{tokens: 5000}}\n")
    try:
        shown = ok("nightly", "validate").stdout
        assert (
            "0 2 * * * in Europe/Berlin; next 2" in shown and f"{tenant}/support" in shown and "5,000 tokens" in shown
        )
        found = json_output("nightly", "status")
        assert len(found["next_times"]) == 3 and found["problems"] == []
        assert f"starts at {found['next_times'][0]}" in ok("nightly", "plan").stderr
        file.write_text("schedules:\nsplit: {held_out: 7}\n")
        wrong = loramill("nightly", "validate")
        assert wrong.exit_code == 1
        lines = [line.partition(": ")[0] for line in wrong.stderr.splitlines() if line.startswith("nightly.yaml")]
        assert lines == ["nightly.yaml:1", "nightly.yaml:2"]
        assert "did you mean schedule?" in ok("nightly", "status").stderr
    finally:
        file.unlink()


def test_nightly_runs_are_listed_with_what_started_them(
    running_gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    time_ = ScheduledTime(scheduled_at=1e9, schedule="0 2 * * * UTC")
    with running_gateway.registry.writing() as session:
        run = nightly_schedule.claim_time(session, time_, time.time())
        assert run is not None
    found = json_output("nightly", "history")[0]
    assert (found["id"], found["state"], found["scheduled_at"]) == (run.id, "interrupted", [1e9])
    assert "schedule" in ok("nightly", "history").stdout
    with running_gateway.registry.writing() as session:
        nightly_schedule.lease_run(session, "elsewhere", now=time.time(), seconds=60)
    assert "elsewhere" in ok("nightly", "status").stdout

    def busy(*_: object, **__: object) -> None:
        raise errors.NightlyBusy("The nightly run is being worked on by elsewhere.")

    monkeypatch.setattr("loramill.pipelines.nightly.run.run_nightly", busy)
    assert "is being worked on by elsewhere" in ok("nightly", "run").stderr  # and it exits with 0
    with running_gateway.registry.writing() as session:
        nightly.finish_run(session, run.id)
    assert json_output("nightly", "show", run.id)["id"] == run.id
    unknown = loramill("nightly", "show", "nightly-x")
    assert unknown.exit_code == 1 and "no nightly run 'nightly-x'" in unknown.stderr


def test_a_failed_nightly_run_is_reported_and_exits_with_1(
    running_gateway: RunningGateway, tenant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = AdapterName(tenant, "a")

    def failing(registry: Any, settings: Settings, *, report: Any, progress: Any) -> Any:
        with registry.writing() as session:
            adapters.get_or_create(session, name)
            run = nightly.open_run(session)
            lines = "".join(f"\na.jsonl, line {number}: it is empty." for number in range(20))
            error = {"error": f"The loss is NaN.{lines}", "data": "set aside"}
            report(nightly.record_step(session, run.id, name, "train", StepStatus.FAILED, error))
            return nightly.finish_run(session, run.id)

    monkeypatch.setattr("loramill.pipelines.nightly.run.run_nightly", failing)
    ran = loramill("nightly", "run")
    assert ran.exit_code == 1 and f"{name}: train failed: The loss is NaN." in ran.stderr
    assert ran.stderr.endswith(f"Nightly run: 1 failed ({name} at train).\n")
    output = " ".join(ran.stdout.split())
    assert "failed train: The loss is NaN. a.jsonl, line 0: it is empty. (and 19 more lines:" in output
    assert "Its data is set aside: `loramill nightly retry" in output and "line 19" in ran.stderr
    as_json = loramill("nightly", "run", "--json")
    assert as_json.exit_code == 1 and as_json.stderr == ""
    assert json.loads(as_json.stdout)["adapters"][0]["reason"].startswith("train: The loss is NaN.")


def test_a_nightly_run_writes_its_report_and_another_command_writes_it_again(
    running_gateway: RunningGateway, tenant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = AdapterName(tenant, "a")
    runs: list[str] = []

    def holding(registry: Any, settings: Settings, *, report: Any, progress: Any) -> Any:
        with registry.writing() as session:
            adapters.get_or_create(session, name)
            run = nightly.open_run(session)
            runs.append(run.id)
            decision = {"promote": False, "reason": "it loses 0.100"}
            report(nightly.record_step(session, run.id, name, "gate", StepStatus.DONE, decision))
            return nightly.finish_run(session, run.id)

    monkeypatch.setattr("loramill.pipelines.nightly.run.run_nightly", holding)
    file = tmp_path / "report.html"
    ran = loramill("nightly", "run", "--report", str(file))
    assert ran.exit_code == 0, ran.stderr
    assert f"Report: {file}" in ran.stderr and "It loses 0.100" in file.read_text()
    printed = Path(ok("nightly", "report").stdout.strip())
    assert printed.parent.name == runs[0] and "It loses 0.100" in printed.read_text()
    other = tmp_path / "other.html"
    found = json_output("nightly", "report", runs[0], "--html", str(other))
    assert found["run"] == runs[0] and found["adapters"][0]["verdict"] == "held" and other.is_file()
    missing = loramill("nightly", "report", "nightly-0")
    assert missing.exit_code == 1 and "There is no nightly run 'nightly-0'" in missing.stderr
    assert loramill("nightly", "report", "--html").exit_code == 2


def test_new_data_is_listed_retried_and_dropped(running_gateway: RunningGateway, tenant: str, train: str) -> None:
    name = f"{tenant}/a"
    added = ok("data", "add", name, "--train", train)
    assert "The next nightly run trains on" in added.stderr
    listed = next(each for each in json_output("nightly", "data")["waiting"] if each["adapter"] == name)
    assert listed["enough"] and name in ok("nightly", "data").stdout
    assert loramill("nightly", "retry", name).exit_code == 1
    with running_gateway.registry.writing() as session:
        run = nightly.open_run(session).id
        nightly.collect(session, run, name)
        nightly.record_step(session, run, name, "train", StepStatus.FAILED, {"error": "The loss is NaN."})
        nightly.finish_run(session, run)
    (aside,) = [each for each in json_output("nightly", "data")["set_aside"] if each["adapter"] == name]
    assert (aside["stage"], aside["reason"]) == ("train", "The loss is NaN.")
    assert name in ok("nightly", "show").stderr, "the last run with anything to do shows it, too"
    assert "1 file" in ok("nightly", "retry", name).stderr
    assert "1 file" in ok("nightly", "drop", name).stderr
    assert name not in ok("nightly", "data").stdout
    refused = loramill("nightly", "drop", name)
    assert refused.exit_code == 1 and "no new data" in refused.stderr


def test_too_little_data_is_named_when_it_is_added(
    running_gateway: RunningGateway, tenant: str, tmp_path: Path
) -> None:
    one = tmp_path / "one.jsonl"
    one.write_bytes(examples().splitlines(keepends=True)[0])
    added = ok("data", "add", f"{tenant}/a", "--train", str(one))
    assert "1 new example so far, and a nightly run needs at least 11" in added.stderr
    assert "add 10 more" in added.stderr


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-5, "just now"),
        (0.4, "just now"),
        (5, "5 s ago"),
        (200, "3 min ago"),
        (7200, "2 h ago"),
        (86400 * 3, "3 d ago"),
    ],
)
def test_times_are_written_in_everyday_units(seconds: float, text: str) -> None:
    assert time_ago(1e9 - seconds, now=1e9) == text


def test_times_long_ago_are_days() -> None:
    assert time_ago(time.time() - 90 * 86400).count("-") == 2
