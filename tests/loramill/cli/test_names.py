"""Names of adapters, versions and jobs on the command line, and shell completion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from loramill.cli import app
from loramill.client import Client
from loramill.errors import InvalidRequest
from loramill.registry import jobs

from ..conftest import RunningGateway, examples
from .running import loramill, ok, use_gateway


@pytest.fixture(autouse=True)
def environment(gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The gateway that commands call, with the admin's key."""
    use_gateway(monkeypatch, gateway)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def versions(gateway: RunningGateway, tenant: str) -> list[str]:
    """Two versions of the tenant's adapter `a`; the first is its champion, the second its challenger."""
    with gateway.client() as client:
        return [gateway.publish(client.jobs.submit(f"{tenant}/a", examples(word=word)).id) for word in ("one", "two")]


def completed(line: str) -> list[str]:
    """The completions that bash offers for the last word of the line."""
    environment = {
        "_LORAMILL_COMPLETE": "complete_bash",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(line.split(" ")) - 1),
    }
    return CliRunner().invoke(app, [], prog_name="loramill", env=environment).stdout.split()


def champion(name: str) -> str:
    return str(json.loads(ok("adapters", "show", name, "--json").stdout)["champion"])


def test_a_version_is_given_in_the_name_or_after_it(tenant: str, versions: list[str]) -> None:
    name, (first, second) = f"{tenant}/a", versions
    assert champion(name) == first
    ok("promote", f"{name}@challenger")
    assert champion(name) == second
    ok("promote", name, first[:8])
    assert champion(name) == first
    ok("adapters", "pin", f"{name}@{second[:8]}")
    assert champion(name) == second
    ok("adapters", "unpin", name)
    assert second[:8] in ok("adapters", "warm", f"{name}@{second[:8]}").stderr
    assert "champion" in ok("adapters", "warm", name).stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("promote", "acme/a"), "give a version"),
        (("promote", "acme/a@previous", "3f2a9c01"), "are two versions"),
        (("adapters", "pin", "acme/a@"), "after the '@'"),
    ],
)
def test_a_version_is_given_exactly_once(arguments: tuple[str, ...], message: str) -> None:
    ran = loramill(*arguments)
    assert ran.exit_code == 2
    assert message in " ".join(ran.stderr.replace("│", " ").split())


def test_an_invalid_name_is_reported_in_english() -> None:
    assert "is not a valid name for an adapter" in loramill("adapters", "show", "acme/!").stderr
    assert "is not a valid name for a tenant" in loramill("adapters", "show", "!/acme").stderr


def test_the_first_digits_of_a_job_are_enough(gateway: RunningGateway, tenant: str) -> None:
    with gateway.client() as client:
        job = client.jobs.submit(f"{tenant}/a", examples())
    short = job.id[:18]
    for command in (("show",), ("events",), ("checkpoints",)):
        assert ok("jobs", *command, short).exit_code == 0
    assert job.id in ok("jobs", "plot", short).stderr
    assert job.id in ok("jobs", "cancel", short).stderr
    assert "no fine-tuning job 'ftjob-123'" in loramill("jobs", "show", "ftjob-123").stderr
    ran = loramill("jobs", "show", f"{tenant}/a")
    assert ran.exit_code == 1 and "is the name of an adapter, not of a job" in ran.stderr


def test_digits_of_several_jobs_are_refused_and_other_tenants_jobs_do_not_count(
    gateway: RunningGateway, tenant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with gateway.client() as client:
        client.tenants.create(f"{tenant}-b")
        made = [client.jobs.submit(f"{name}/a", examples()).id for name in (tenant, f"{tenant}-b")]
    digits = iter(["abcdef" + 17 * "0" + last for last in "123"])
    monkeypatch.setattr("secrets.token_hex", lambda _: next(digits))
    with gateway.registry.writing() as session:
        specs = [jobs.get(session, job).spec for job in made]
        mine, *_ = [jobs.submit(session, spec, {}).id for spec in (*specs, specs[1])]
    monkeypatch.undo()
    with gateway.client() as client, pytest.raises(InvalidRequest, match="give more digits"):
        client.jobs.get("ftjob-abcdef")
    with gateway.client() as admin:
        key = admin.keys.create(tenant).key
    with Client(gateway.url, key) as client:
        assert client.jobs.get("ftjob-abcdef").id == mine


def test_a_shell_completes_commands_and_what_the_gateway_lists(
    gateway: RunningGateway, tenant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loramill.cli.complete._TIMEOUT_SECONDS", 60.0)  # a busy machine takes longer than 2 s
    with gateway.client() as client:
        job = client.jobs.submit(f"{tenant}/a", examples())
    gateway.publish(job.id)
    assert completed("loramill jobs sh") == ["show"]
    assert {"list", "watch", "cancel"} <= set(completed("loramill jobs "))
    assert completed("loramill adapters ex") == ["export"]
    assert completed(f"loramill adapters show {tenant}/") == [f"{tenant}/a"]
    assert completed(f"loramill chat {tenant}/") == [f"{tenant}/a"]
    assert completed(f"loramill jobs show {job.id[:20]}") == [job.id]


def test_a_shell_that_finds_no_gateway_completes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAMILL_URL", "http://127.0.0.1:9")
    assert completed("loramill adapters show ac") == []


def test_history_shows_numbers_once_and_short(gateway: RunningGateway, tenant: str) -> None:
    with gateway.client() as client:
        job = client.jobs.submit(f"{tenant}/a", examples())
    data: dict[str, Any] = {
        "step": 1,
        "total_steps": 36,
        "train_loss": 4.233459949493408,
        "train_mean_token_accuracy": 0.26966291666030884,
        "valid_loss": 3.5,
        "full_valid_loss": 3.5,
        "learning_rate": 1.6666e-05,
        "trained_tokens": 1034567,
    }
    with gateway.registry.writing() as session:
        jobs.add_event(session, job.id, "Step 1/36: training loss=4.233", kind="metrics", data=data)
    line = ok("jobs", "events", job.id).stdout.strip().splitlines()[-1]
    assert line.endswith(
        "Step 1/36: training loss=4.233  "
        "train_mean_token_accuracy=0.2697 valid_loss=3.5 learning_rate=1.667e-05 trained_tokens=1034567"
    )
    output = ok("jobs", "show", job.id).stdout
    assert "smollm2-135m" in output and "at each checkpoint" in output and job.spec["base"] not in output
