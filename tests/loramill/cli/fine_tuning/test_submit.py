"""`loramill submit` and the list of jobs: waiting for the end, and what is printed of a job."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from loramill import errors

from ...conftest import RunningGateway, examples
from ..running import COMMAND, json_output, loramill, ok


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


def test_warnings_and_errors_of_data_are_reported(running_gateway: RunningGateway, tenant: str, tmp_path: Path) -> None:
    twice = tmp_path / "twice.jsonl"
    twice.write_bytes(examples() + examples(1))
    assert "Warning: " in ok("submit", f"{tenant}/a", "--train", str(twice)).stderr
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_bytes(b"[1]\n" + examples())
    ran = loramill("submit", f"{tenant}/a", "--train", str(wrong))
    assert ran.exit_code == 1 and "wrong.jsonl" in ran.stderr


def test_a_wrong_target_is_refused_with_the_valid_ones(
    running_gateway: RunningGateway, tenant: str, train: str
) -> None:
    ran = loramill("submit", f"{tenant}/b", "--train", train, "--targets", "q_proj,nose")
    assert ran.exit_code == 1 and "nose" in ran.stderr and "down_proj" in ran.stderr


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
