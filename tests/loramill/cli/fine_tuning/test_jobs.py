"""`loramill submit` and `loramill jobs`: submitting, changing and watching jobs."""

from __future__ import annotations

import hashlib
import io
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from loramill import Client
from loramill.cli.fine_tuning.job_options import PANELS
from loramill.cli.fine_tuning.job_table import jobs_table
from loramill.cli.fine_tuning.watch import JobPoller, _follow
from loramill.client.jobs import JobsResource
from loramill.client.models import Job
from loramill.errors import InvalidRequest, NotRunning, TrainingDiverged, Unavailable
from loramill.registry import jobs
from loramill.registry.jobs import checkpoints
from loramill.submission.options import JobOptions
from loramill.types import JobStatus

from ...conftest import RunningGateway, examples
from ..running import json_output, loramill, ok, use_gateway


@pytest.fixture(autouse=True)
def environment(gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The gateway that commands call, with the admin's key, and files to submit."""
    use_gateway(monkeypatch, gateway)
    monkeypatch.chdir(tmp_path)
    Path("train.jsonl").write_bytes(examples())


def submitted(tenant: str, *arguments: str) -> str:
    return ok("submit", f"{tenant}/a", "--train", "train.jsonl", *arguments).stdout.strip()


# Submitting


def test_a_sweep_is_shown_as_a_table(tenant: str, gateway: RunningGateway) -> None:
    Path("valid.jsonl").write_bytes(examples(3, "other"))
    sweep = ("--valid", "valid.jsonl", "--sweep", "learning-rate=1e-4,1e-3", "--sweep", "rank=4,8")
    job_id = submitted(tenant, *sweep)
    table = json_output("jobs", "show", job_id)["sweep"]
    assert [(row["values"]["learning_rate"], row["values"]["rank"]) for row in table] == [
        (1e-4, 4),
        (1e-4, 8),
        (1e-3, 4),
        (1e-3, 8),
    ]
    lines = ok("jobs", "show", job_id).stdout.splitlines()
    header = next(index for index, line in enumerate(lines) if line.startswith("CANDIDATE"))
    assert lines[header].split()[1:4] == ["RANK", "ALPHA", "LEARNING_RATE"]
    assert len(lines) == header + 5 and lines[-1].split()[-1] == "queued"
    ok("jobs", "cancel", job_id)
    assert ok("jobs", "show", job_id).stdout.splitlines()[-1].split()[-1] == "cancelled"
    for text, message in (("rnk=1,2", "did you mean 'rank'"), ("", "has no candidates")):
        assert message in loramill("submit", f"{tenant}/a", "--train", "train.jsonl", "--sweep", text).output


def test_every_option_of_a_job_is_an_option_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = [name for names in PANELS.values() for name in names]
    assert sorted(listed) == sorted(JobOptions.model_fields)
    monkeypatch.setenv("COLUMNS", "200")
    text = ok("submit", "--help").stdout
    for name in listed:
        assert f"--{name.replace('_', '-')}" in text


def test_options_of_every_type_reach_the_spec(tenant: str) -> None:
    options = (
        "--method dora --rank 4 --alpha 8 --no-packing --targets q_proj,v_proj --layers 0-2,5 --lr 0.01 --keep last "
        "--rank-pattern q_proj=2 --alpha-pattern q_proj=1.5 --metadata team=a,run=2 --priority -5 --schedule cosine "
        "--gradient-checkpointing yes --eval-every 3"
    )
    job = json_output("jobs", "show", submitted(tenant, *options.split()))
    assert {
        "method": "dora",
        "rank": 4,
        "alpha": 8.0,
        "packing": False,
        "targets": ["q_proj", "v_proj"],
        "layers": [0, 1, 2, 5],
        "learning_rate": 0.01,
        "keep": "last",
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"q_proj": 1.5},
        "schedule": "cosine",
        "gradient_checkpointing": True,
        "eval_every": 3,
    }.items() <= job["spec"].items()
    assert (job["metadata"], job["priority"]) == ({"team": "a", "run": "2"}, -5)


def test_a_table_is_submitted_by_its_columns(tenant: str) -> None:
    Path("t.csv").write_text("q,a\n" + "".join(f"what is {i}?,number {i}\n" for i in range(12)))
    refused = loramill("submit", f"{tenant}/a", "--train", "t.csv")
    assert refused.exit_code == 1 and "it is" not in refused.stdout and "columns q, a" in refused.stderr
    job = ok("submit", f"{tenant}/a", "--train", "t.csv", "--columns", "prompt=q,completion=a").stdout.strip()
    with Client() as client:
        content = client.openai().files.content(client.jobs.get(job).training_file).read()
    assert json.loads(content.splitlines()[3]) == {"prompt": "what is 3?", "completion": "number 3"}


def test_a_file_of_jobs(tenant: str, tmp_path: Path) -> None:
    file = tmp_path / "jobs.csv"
    file.write_text("adapter,train,rank\n" + "".join(f"{tenant}/a{i},train.jsonl,{i + 1}\n" for i in range(60)))
    first = ok("submit", "--file", str(file), "--steps", "5")
    assert "60 jobs submitted; " in first.stderr and len(first.stdout.splitlines()) == 61
    file.write_text(file.read_text() + f"{tenant}/more,train.jsonl,\n")
    again = json.loads(ok("submit", "--file", str(file), "--steps", "5", "--json").stdout)
    assert [each["new"] for each in again] == [False] * 60 + [True]
    assert (again[7]["job"]["spec"]["rank"], again[7]["job"]["steps"]) == (8, 5)
    assert again[60]["where"] == "jobs.csv, line 62"
    assert len(json_output("jobs", "--tenant", tenant, "-n", "100")) == 61
    cut = ok("submit", "--file", str(file), "--steps", "5")
    assert "0 jobs submitted, 61 were submitted before" in cut.stderr


def test_a_file_with_problems_submits_nothing(tenant: str) -> None:
    Path("jobs.toml").write_text(
        f'[[jobs]]\nadapter = "{tenant}/a"\ntrain = "train.jsonl"\n'
        f'[[jobs]]\nadapter = "{tenant}/a"\ntrain = "nowhere.jsonl"\nrank = 0.5\n'
    )
    ran = loramill("submit", "--file", "jobs.toml")
    assert ran.exit_code == 1 and "2 problems; nothing was submitted:" in ran.stderr
    assert "jobs.toml, line 4: train: there is no file" in ran.stderr and "line 4: rank" in ran.stderr
    assert json_output("jobs", "--tenant", tenant) == []


def test_submit_waits_for_the_jobs_of_a_file(
    gateway: RunningGateway, tenant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("jobs.jsonl").write_text(
        "".join(
            json.dumps({"adapter": f"{tenant}/a", "train": "train.jsonl", "seed": seed}) + "\n" for seed in range(3)
        )
    )

    def work(_: float) -> None:
        with gateway.client() as client:
            for job in [*client.jobs.list(tenant)][::-1]:
                if job.status is JobStatus.QUEUED:
                    gateway.publish(job.id)

    monkeypatch.setattr("loramill.cli.fine_tuning.watch.sleep", work)
    ran = ok("submit", "--file", "jobs.jsonl", "--wait")
    assert "3 jobs: 3 succeeded" in ran.stdout


# Changing


def test_several_jobs_are_changed_at_once(tenant: str) -> None:
    first, second = submitted(tenant), submitted(tenant, "--seed", "2")
    assert [job["status"] for job in json_output("jobs", "pause", first, second)] == ["paused", "paused"]
    assert first in ok("jobs", "resume", first).stderr
    ran = loramill("jobs", "resume", first, second, "ftjob-none", "--json")
    assert ran.exit_code == 1 and [job["id"] for job in json.loads(ran.stdout)] == [second]
    assert "it is queued, not paused" in ran.stderr and "ftjob-none" in ran.stderr
    assert [job["status"] for job in json_output("jobs", "cancel", first, second)] == ["cancelled"] * 2


def test_failed_and_cancelled_jobs_are_queued_again(gateway: RunningGateway, tenant: str) -> None:
    failed, cancelled, queued = (submitted(tenant, "--seed", seed) for seed in "123")
    gateway.fail(failed, TrainingDiverged("The loss is not finite."))
    ok("jobs", "cancel", cancelled)
    refused = loramill("jobs", "resume", failed)
    assert refused.exit_code == 1 and "`loramill jobs retry`" in refused.stderr
    output = ok("jobs", "retry", failed, cancelled).stderr
    assert [line for line in output.splitlines() if line] == [
        f"{job} is queued again (now queued)." for job in (failed, cancelled)
    ]
    assert [(json_output("jobs", "show", job)["status"]) for job in (failed, cancelled)] == ["queued", "queued"]
    ran = loramill("jobs", "retry", failed, queued, "ftjob-none")
    assert ran.exit_code == 1 and "is queued, neither failed nor cancelled" in ran.stderr and "ftjob-none" in ran.stderr


def test_a_fair_share_is_shown_and_changed(tenant: str) -> None:
    output = ok("tenant", "share", tenant, "--weight", "2.5", "--max-running", "3").stderr
    assert "weight 2.5" in output and "max running: 3" in output and "max waiting: unlimited" in output
    set_to = json_output("tenant", "share", tenant, "--max-running", "unlimited", "--max-queued", "1")
    assert (set_to["weight"], set_to["max_running"], set_to["max_queued"]) == (2.5, None, 1)
    row = next(line for line in ok("tenant", "list").stdout.splitlines() if line.startswith(f"{tenant} "))
    assert row.split()[-5:] == ["2.5", "0", "unlimited", "0", "1"]
    submitted(tenant)
    refused = loramill("submit", f"{tenant}/a", "--train", "train.jsonl", "--seed", "2")
    assert refused.exit_code == 1 and "waiting" in refused.stderr
    assert loramill("tenant", "share", tenant, "--max-running", "some").exit_code == 2


# Showing


def test_a_job_of_another_base_is_shown_with_what_it_waits_for(
    gateway: RunningGateway, tenant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    other = hashlib.sha256(b"another base").hexdigest()
    own = submitted(tenant)
    with gateway.registry.writing() as session:
        spec = jobs.get(session, own).spec.model_copy(update={"base": other})
        foreign = jobs.submit(session, spec, {}).id
    reason = f"base {other[:12]}, which is not served here"
    rows = {line.split()[0]: line for line in ok("jobs", "list", "--tenant", tenant).stdout.splitlines() if line}
    assert f"queued, waits for {reason}" in rows[foreign]
    assert "waits for" not in rows[own]
    assert ["waits", "for", *reason.split()] in [
        line.split() for line in ok("jobs", "show", foreign).stdout.splitlines()
    ]
    assert "waits for" not in ok("jobs", "show", own).stdout
    ok("jobs", "cancel", foreign)
    assert "waits for" not in ok("jobs", "show", foreign).stdout


def test_checkpoints_and_plot(gateway: RunningGateway, tenant: str, tmp_path: Path) -> None:
    job = submitted(tenant)
    assert "has no checkpoints yet" in ok("jobs", "checkpoints", job).stderr
    assert "has no measurements yet" in ok("jobs", "plot", job).stderr
    attempt = gateway.begin(job, step=10)
    with gateway.registry.writing() as session:
        for step in range(1, 11):
            data = {"step": step, "train_loss": 3 / step} | ({"valid_loss": 0.5} if step == 10 else {})
            jobs.add_event(session, job, "", kind="metrics", data=data)
        checkpoints.add(session, job, attempt, 10, None, {"valid_loss": 0.5, "train_loss": 0.3})
    assert ok("jobs", "checkpoints", job).stdout.splitlines()[1].split()[:3] == ["10", "0.5000", "0.3000"]
    (checkpoint,) = json_output("jobs", "checkpoints", job)
    assert checkpoint["metrics"]["valid_loss"] == 0.5 and checkpoint["model"] is None
    text = ok("jobs", "plot", job).stdout
    assert f"{tenant}/a" in text and "┤" in text
    assert len(json_output("jobs", "plot", job)) == 10
    assert "10 steps" in ok("jobs", "plot", job, "--png", "x.png").stderr
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def job(number: int, status: JobStatus, **more: Any) -> Job:
    return Job(
        id=f"ftjob-{number}",
        adapter=f"acme/a{number}",
        status=status,
        base="b",
        steps=10,
        training_file="f",
        created_at=float(number),
        **more,
    )


def drawn(rendered: Any, width: int = 130) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(rendered)
    return console.export_text()


def test_the_table_shows_running_jobs_first() -> None:
    many = [job(n, JobStatus.SUCCEEDED, step=10) for n in range(5)] + [
        job(8, JobStatus.QUEUED),
        job(9, JobStatus.RUNNING, step=5, loss=1.25, valid_loss=1.5, tokens_per_second=1234.5, estimated_finish=1090.0),
        job(7, JobStatus.RUNNING, step=1, tokens_per_second=100.0, pending_action="pause"),
    ]
    text = drawn(jobs_table(many, 1000.0, 130, rows=3))
    rows = text.splitlines()
    assert rows[1].split()[:3] == ["ftjob-9", "acme/a9", "running"]
    assert rows[1].split()[-6:] == ["5/10", "1.250", "1.500", "1,234", "2", "min"]
    assert "running (pause)" in rows[2] and rows[3].split()[2] == "queued"
    assert rows[4] == "… and 5 succeeded"
    assert rows[5] == "8 jobs: 2 running, 1 queued, 5 succeeded; 1,334 tokens/s"
    assert "unreachable" in drawn(jobs_table(many, 0.0, 130, outage=NotRunning("Nothing answers.")))
    narrow = drawn(jobs_table(many, 1000.0, 80), width=80)
    assert "ftjob" not in narrow and "1,234" in narrow and "…" not in narrow


def test_watching_ends_with_the_last_job(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """An outage of the gateway is waited for; a gateway that never answered is an error."""
    answers: list[Any] = [
        [job(1, JobStatus.RUNNING)],
        NotRunning("Nothing answers."),
        Unavailable("Not yet."),
        [job(1, JobStatus.SUCCEEDED)],
    ]

    def poll() -> list[Job]:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer  # type: ignore[no-any-return]

    assert [each.status for each in _follow(poll, 0.0)] == ["succeeded"] and answers == []
    assert "1 job: 1 succeeded" in capsys.readouterr().out
    for error in (NotRunning("Nothing answers."), InvalidRequest("No.")):
        answers.append(error)
        with pytest.raises(type(error)):
            _follow(poll, 0.0)
    answers[:] = [[job(1, JobStatus.RUNNING)], InvalidRequest("No.")]
    with pytest.raises(InvalidRequest):
        _follow(poll, 0.0)


def test_ended_jobs_are_not_polled_again(gateway: RunningGateway, tenant: str) -> None:
    ended = [submitted(tenant, "--seed", str(seed)) for seed in range(3)]
    ok("jobs", "cancel", *ended)
    open_job = submitted(tenant, "--seed", "9")
    later = submitted(tenant, "--seed", "10")
    ok("jobs", "cancel", later)
    listed: list[str] = []

    class CountingJobs(JobsResource):
        def list(self, tenant: str | None = None) -> Iterator[Job]:
            for found in super().list(tenant):
                listed.append(found.id)
                yield found

    with gateway.client() as client:
        client.jobs = CountingJobs(client._transport, client.files)
        every = JobPoller(client, tenant, 100)
        assert [found.id for found in every.poll()] == listed == [later, open_job, *ended[::-1]]
        listed.clear()
        newer = submitted(tenant, "--seed", "11")
        assert [found.id for found in every.poll()] == [newer, later, open_job, *ended[::-1]]
        assert listed == [newer, later, open_job, ended[-1]]
        assert len(JobPoller(client, tenant, 2).poll()) == 2
        listed.clear()
        some = JobPoller(client, None, 1, [ended[-1]])
        assert [found.id for found in some.poll()] == [ended[-1]] == [found.id for found in some.poll()]
        ok("jobs", "cancel", open_job, newer)


def test_watch(gateway: RunningGateway, tenant: str) -> None:
    assert "No jobs yet" in ok("jobs", "watch", "--tenant", tenant).stderr
    first = submitted(tenant)
    assert "1 job: 1 queued" in ok("jobs", "watch", "--tenant", tenant, "--once").stdout
    threading.Timer(0.3, gateway.publish, [first]).start()
    began = time.monotonic()
    assert "1 job: 1 succeeded" in ok("jobs", "watch", "--tenant", tenant, "--interval", "0.1").stdout
    assert time.monotonic() - began > 0.2
