"""`loramill nightly` and `loramill data` on a registry with runs: what they print, and their exit codes."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from loramill import errors
from loramill.names import AdapterName
from loramill.registry import adapters, nightly, nightly_schedule
from loramill.settings import Settings
from loramill.types import ScheduledTime, StepStatus

from ...conftest import RunningGateway, examples
from ..running import json_output, loramill, ok


def test_the_last_nightly_run_is_shown(running_gateway: RunningGateway, tenant: str) -> None:
    name = AdapterName(tenant, "a")
    score = {"examples": 2, "exact_match": 0.5, "token_f1": 0.25}
    with running_gateway.registry.writing() as session:
        adapters.get_or_create(session, name)
        nightly.finish_run(session, nightly.open_run(session).id)  # rollouts that ended before it are not shown
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
    assert output.stderr == "Nightly run: 1 promoted.\n"
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

    def failing(registry: Any, settings: Settings, *, report: Any, publish: Any, progress: Any) -> Any:
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

    def holding(registry: Any, settings: Settings, *, report: Any, publish: Any, progress: Any) -> Any:
        with registry.writing() as session:
            adapters.get_or_create(session, name)
            run = nightly.open_run(session)
            runs.append(run.id)
            decision = {"promote": False, "reason": "it loses 0.100"}
            report(nightly.record_step(session, run.id, name, "gate", StepStatus.DONE, decision))
        publish(run, [])
        with registry.writing() as session:
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
