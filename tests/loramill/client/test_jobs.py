"""Files and jobs of `loramill.Client`, with the real gateway."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loramill import errors
from loramill.client.jobs import JobsResource
from loramill.client.models import File
from loramill.registry import jobs
from loramill.registry.jobs import checkpoints
from loramill.submission.options import JobOptions, JobOptionsDict
from loramill.types import JobStatus

from ..conftest import RunningGateway, examples


@pytest.mark.parametrize("as_admin", [True, False])
def test_a_job_from_file_to_answer(gateway: RunningGateway, tenant: str, as_admin: bool, tmp_path: Path) -> None:
    train = tmp_path / "mine.jsonl"
    train.write_bytes(examples())
    name = f"{tenant}/support"
    with gateway.client() as admin:
        key = None if as_admin else admin.keys.create(tenant).key
    with gateway.client(key) as client:
        job = client.jobs.submit(
            name, train, valid=examples(3, "other"), steps=5, rank=4, learning_rate=3e-3, targets=["q_proj"], seed=3
        )
        assert (job.adapter, job.base, job.status) == (name, "smollm2-135m", JobStatus.QUEUED)
        assert {key: job.spec[key] for key in ("steps", "rank", "learning_rate", "targets", "seed")} == {
            "steps": 5,
            "rank": 4,
            "learning_rate": 3e-3,
            "targets": ["q_proj"],
            "seed": 3,
        }
        assert job.validation_file is not None
        assert job.failure is None
        version = gateway.publish(job.id)
        updates = []
        done = client.jobs.wait(job.id, updates.append)
        assert done.model == f"{name}@{version[:12]}"
        assert updates == [done]
        assert name in client.models()
        assert client.chat(name, "Hello there") == "Hello there"
        assert "".join(client.stream(done.model, [{"role": "user", "content": "one two"}])) == "one two"
        assert client.chat("smollm2-135m", "one two three", max_tokens=2) == "one two"
        adapter = client.adapters.get(name)
        assert (adapter.champion, [each.id for each in adapter.versions]) == (version, [version])
        assert adapter.history[0].version == version
        assert [each.name for each in client.adapters.list(tenant)] == [name]


def test_epochs_and_batch_size_reach_the_spec(gateway: RunningGateway, tenant: str) -> None:
    with gateway.client() as client:
        job = client.jobs.submit(f"{tenant}/a", examples(40), epochs=2, batch_size=8)
        assert (job.spec["batch_size"], job.steps) == (8, 10)


#: One value for each option that the gateway copies into the spec unchanged.
OPTIONS: dict[str, object] = {
    "method": "adalora",
    "rank": 3,
    "alpha": 5.0,
    "rslora": True,
    "dropout": 0.25,
    "targets": ["v_proj", "q_proj"],
    "layers": [0, 3],
    "rank_pattern": {"v_proj": 2},
    "alpha_pattern": {"v_proj": 1.5},
    "init_rank": 9,
    "loraplus_lr_ratio": 4.0,
    "train_on": "all",
    "learning_rate": 2e-3,
    "schedule": "cosine",
    "steps": 7,
    "batch_size": 3,
    "warmup_ratio": 0.5,
    "weight_decay": 0.125,
    "max_grad_norm": 2.0,
    "max_length": 99,
    "packing": False,
    "micro_tokens": 100,
    "gradient_checkpointing": True,
    "offload": "optimizer",
    "gpus": 2,
    "checkpoint_every": 4,
    "eval_every": 2,
    "patience": 3,
    "keep": "last",
    "seed": 11,
}
#: Values for the options of preference tuning, by objective.
PREFERENCES: dict[str, dict[str, object]] = {
    "dpo": {"dpo_loss": "ipo", "beta": 0.3},
    "orpo": {"beta": 0.25},
    "kto": {"beta": 0.2, "desirable_weight": 2.0, "undesirable_weight": 0.5},
}
#: Options that are not fields of the spec.
OTHERS = {"epochs", "base", "metadata", "quantization", "start_from", "priority", "executor", "sweep"}


def test_every_option_reaches_the_spec(gateway: RunningGateway, tenant: str) -> None:
    """Each keyword of `submit` arrives in the spec under the gateway's name for it."""
    preference = {"objective"}.union(*PREFERENCES.values())
    assert set(JobOptions.model_fields) == set(JobOptionsDict.__annotations__) == set(OPTIONS) | OTHERS | preference
    with gateway.client() as client:
        job = client.jobs.submit(
            f"{tenant}/a",
            examples(),
            metadata={"by": "test"},
            base="smollm2-135m",
            quantization="none",
            priority=-3,
            executor="dedicated",
            **OPTIONS,  # type: ignore[typeddict-item]
        )
    assert OPTIONS.items() <= job.spec.items()
    assert (job.metadata, job.priority, job.executor) == ({"by": "test"}, -3, "dedicated")


@pytest.mark.parametrize("objective", PREFERENCES)
def test_options_of_preference_tuning_reach_the_spec(gateway: RunningGateway, tenant: str, objective: str) -> None:
    answers = {"completion": " b", "label": True} if objective == "kto" else {"chosen": " b", "rejected": " c"}
    lines = b"".join(json.dumps({"prompt": f"{i}?", **answers}).encode() + b"\n" for i in range(12))
    with gateway.client() as client:
        job = client.jobs.submit(f"{tenant}/a", lines, objective=objective, **PREFERENCES[objective])  # type: ignore
        assert {"objective": objective, **PREFERENCES[objective]}.items() <= job.spec.items()
        rewards = [{"rewards/chosen": 0.5}, {"rewards/chosen": 0.75, "valid_rewards/margins": -1.5}]
        with gateway.registry.writing() as session:
            for step, data in enumerate(rewards, start=1):
                jobs.add_event(session, job.id, "", kind="metrics", data={"step": step, "train_loss": 0.25, **data})
        assert [(point.train_loss, point.rewards) for point in client.jobs.metrics(job.id)] == [
            (0.25, each) for each in rewards
        ]


def test_a_sweep_is_submitted_as_one_job(gateway: RunningGateway, tenant: str) -> None:
    with gateway.client() as client:
        valid = examples(3, "other")
        job = client.jobs.submit(f"{tenant}/a", examples(), valid=valid, sweep={"rank": [4, 8], "dropout": [0.0, 0.1]})
        assert [(each.number, each.values["rank"], each.values["dropout"]) for each in job.sweep] == [
            (1, 4, 0.0),
            (2, 4, 0.1),
            (3, 8, 0.0),
            (4, 8, 0.1),
        ]
        assert job.executor == "session" and client.jobs.get(job.id) == job
        with pytest.raises(errors.InvalidRequest, match="validation file"):
            client.jobs.submit(f"{tenant}/a", examples(), sweep={"rank": [4, 8]})


def test_invalid_options_are_reported_together(gateway: RunningGateway, tenant: str) -> None:
    with gateway.client() as client:
        with pytest.raises(errors.InvalidRequest) as caught:
            client.jobs.submit(f"{tenant}/a", examples(), rnak=3, alpha="much")  # type: ignore[call-arg, arg-type]
        assert "did you mean 'rank'?" in caught.value.message and "alpha: " in caught.value.message
        assert client.jobs.submit(f"{tenant}/a", examples(), rank=None, layers="0-2,5").spec["layers"] == [0, 1, 2, 5]


def test_a_job_is_paused_and_resumed_and_has_metrics(gateway: RunningGateway, tenant: str) -> None:
    with gateway.client() as client:
        job = client.jobs.submit(f"{tenant}/a", examples(), steps=10)
        assert client.jobs.pause(job.id).status is JobStatus.PAUSED
        assert client.jobs.get(job.id).failure is None
        assert client.jobs.resume(job.id).status is JobStatus.QUEUED
        assert (client.jobs.metrics(job.id), client.jobs.checkpoints(job.id)) == ([], [])
        attempt = gateway.begin(job.id, step=4)
        assert client.jobs.pause(job.id).pending_action == "pause"
        with gateway.registry.writing() as session:
            for step in (2, 1, 2):
                data = {"step": step, "train_loss": 1 / step, "trained_tokens": 5 * step}
                jobs.add_event(session, job.id, "", kind="metrics", data=data)
            jobs.add_event(session, job.id, "", kind="metrics", data={"step": 2, "valid_loss": 0.75})
            checkpoints.add(session, job.id, attempt, 4, None, {"valid_loss": 0.5})
        points = client.jobs.metrics(job.id)
        assert [(point.step, point.train_loss, point.valid_loss) for point in points] == [(1, 1, None), (2, 0.5, 0.75)]
        assert points[1].trained_tokens == 10
        (checkpoint,) = client.jobs.checkpoints(job.id)
        assert (checkpoint.step, checkpoint.model, checkpoint.metrics["valid_loss"]) == (4, None, 0.5)
        with pytest.raises(errors.NotFound):
            client.jobs.metrics("ftjob-none")


def test_a_failed_job_is_retried(gateway: RunningGateway, tenant: str) -> None:
    with gateway.client() as client:
        job = client.jobs.submit(f"{tenant}/a", examples(), steps=10)
        with pytest.raises(errors.Conflict, match="is queued, neither failed nor cancelled"):
            client.jobs.retry(job.id)
        gateway.fail(job.id, errors.TrainingDiverged("The loss is not finite."))
        assert client.jobs.get(job.id).error == "The loss is not finite."
        again = client.jobs.retry(job.id)
        assert (again.status, again.error, again.failure, again.step) == (JobStatus.QUEUED, None, None, 1)
        assert [event.message for event in client.jobs.events(job.id)][-1] == "Queued again after it failed."
        gateway.publish(job.id)
        with pytest.raises(errors.Conflict, match="is succeeded"):
            client.jobs.retry(job.id)
        with pytest.raises(errors.NotFound):
            client.jobs.retry("ftjob-none")


def test_files_are_reused_and_deleted(gateway: RunningGateway, tenant: str) -> None:
    with gateway.client() as client:
        file = client.files.upload(examples(), tenant=tenant)
        assert client.files.upload(examples(), tenant=tenant, reuse=True).id == file.id
        assert client.files.upload(examples(), tenant=tenant).id != file.id
        client.files.delete(file.id)
        with pytest.raises(errors.NotFound):
            client.files.delete(file.id)


# Many jobs


def test_a_batch_is_submitted_once(gateway: RunningGateway, tenant: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(examples())
    progress = []
    rows = [{"adapter": f"{tenant}/a{i}", "train": tmp_path / "a.jsonl", "rank": 4 + i} for i in range(5)]
    with gateway.client() as client:
        found = client.jobs.submit_many(rows, defaults={"steps": 5}, on_progress=lambda *now: progress.append(now))
        assert [(each.job.adapter, each.job.spec["rank"], each.job.steps, each.new) for each in found] == [
            (f"{tenant}/a{i}", 4 + i, 5, True) for i in range(5)
        ]
        assert len({each.job.training_file for each in found}) == 1  # uploaded once
        assert progress[0] == ("uploading", 0, 5) and progress[-1] == ("submitting", 1, 1)
        # Submitting again with one more job, as after a crash: the existing jobs and their file are found.
        uploaded: list[File] = []
        more = [*rows, {**rows[0], "columns": "auto", "seed": 1}]
        again = client.jobs.submit_many(more, defaults={"steps": 5}, on_upload=uploaded.append)
        assert [file.id for file in uploaded] == [found[0].job.training_file]  # reported once
        assert [each.new for each in again] == [False] * 5 + [True]
        assert [each.job.id for each in again[:5]] == [each.job.id for each in found]
        assert again[5].job.training_file == found[0].job.training_file
        client.jobs.cancel(found[1].job.id)
        retried = client.jobs.submit_many(rows, defaults={"steps": 5}, retry=True)
        assert [each.new for each in retried] == [False, True, False, False, False]
        assert all(each.new for each in client.jobs.submit_many(rows, defaults={"steps": 5}, name="second"))
        (tmp_path / "a.jsonl").write_bytes(examples(13))
        assert all(each.new for each in client.jobs.submit_many(rows, defaults={"steps": 5}))


def test_a_batch_is_checked_before_any_job_is_submitted(gateway: RunningGateway, tenant: str, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_bytes(b"[1]\n" + examples())
    good: dict[str, object] = {"adapter": f"{tenant}/a", "train": examples(), "steps": 5}

    def refused(*rows: dict[str, object]) -> list[str]:
        with pytest.raises(errors.InvalidRequest) as caught:
            client.jobs.submit_many([good, *rows])
        assert list(client.jobs.list(tenant)) == []
        head, *problems = caught.value.message.splitlines()
        assert head == f"{len(problems)} problem{'s' * (len(problems) > 1)}; nothing was submitted:"
        return problems

    with gateway.client() as client:
        # Checks on this machine come first, for all jobs.
        local = refused({"adapter": "noslash", "train": "/nowhere.jsonl", "rnak": 3}, {**good, "rank": "x"}, {})
        assert [problem.partition(":")[0] for problem in local] == ["job 2"] * 3 + ["job 3"] + ["job 4"] * 2
        # Then the data is checked, then the specs, by the gateway.
        (data,) = refused({**good, "train": tmp_path / "bad.jsonl", "seed": 1})
        assert data.startswith("job 2: bad.jsonl, line 1: ")
        specs = refused({**good, "rank": 10_000}, {**good, "seed": 1}, {**good, "targets": ["nose"]})
        assert [problem.partition(":")[0] for problem in specs] == ["job 2", "job 4"]
        assert refused({**good}) == [
            "job 2: the same job as job 1; remove one, or give it another seed.",
        ]


def test_a_crash_between_two_requests_loses_no_job(
    gateway: RunningGateway, tenant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loramill.client.jobs._BATCH_SIZE", 2)
    rows = [{"adapter": f"{tenant}/a", "train": examples(), "steps": 5, "seed": seed} for seed in range(5)]
    sent = []
    send = JobsResource._send_batch

    def crashing(self: JobsResource, *args: object, check_only: bool, retry: bool) -> object:
        if not check_only:
            if len(sent) == 1:
                raise KeyboardInterrupt
            sent.append(args)
        return send(self, *args, check_only=check_only, retry=retry)  # type: ignore[arg-type]

    with gateway.client() as client:
        with monkeypatch.context() as crash:
            crash.setattr(JobsResource, "_send_batch", crashing)
            with pytest.raises(KeyboardInterrupt):
                client.jobs.submit_many(rows)
        assert len(list(client.jobs.list(tenant))) == 2
        assert [each.new for each in client.jobs.submit_many(rows)] == [False, False, True, True, True]
        assert sorted(job.seed for job in client.jobs.list(tenant)) == [0, 1, 2, 3, 4]
        client.tenants.set_share(tenant, max_queued=6)
        more = [{**row, "rank": 2} for row in rows[:2]]
        with pytest.raises(errors.InvalidRequest, match="nothing was submitted") as caught:
            client.jobs.submit_many(more)
        assert "quota" in caught.value.message or "waiting" in caught.value.message


def test_jobs_are_listed_across_pages(gateway: RunningGateway, tenant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loramill.client.jobs._PAGE_SIZE", 2)
    with gateway.client() as client:
        file = client.files.upload(examples(), tenant=tenant)
        ids = [client.jobs.submit(f"{tenant}/a", file, seed=i).id for i in range(5)]
        assert [job.id for job in client.jobs.list(tenant)] == ids[::-1]
        assert set(ids) <= {job.id for job in client.jobs.list()}
        assert client.jobs.submit(f"{tenant}/a", file.id).training_file == file.id


def test_events_are_oldest_first_and_followed_to_the_end(
    gateway: RunningGateway, tenant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loramill.client.jobs._PAGE_SIZE", 2)
    with gateway.client() as client:
        job = client.jobs.submit(f"{tenant}/a", examples())
        events = client.jobs.events(job.id, follow=True, poll_seconds=0.01)
        messages = [next(events).message]
        gateway.publish(job.id)
        messages += [event.message for event in events]
        assert [text.split()[0].rstrip(".") for text in messages] == ["Queued", "Attempt", "Published"]
        assert [event.message for event in client.jobs.events(job.id)] == messages


def test_a_job_that_does_not_succeed_is_an_error_of_its_class(gateway: RunningGateway, tenant: str) -> None:
    with gateway.client() as client:
        diverged = client.jobs.submit(f"{tenant}/a", examples())
        gateway.fail(diverged.id, errors.TrainingDiverged("The loss is NaN at step 3."))
        with pytest.raises(errors.TrainingDiverged, match=f"{diverged.id}.*NaN at step 3"):
            client.jobs.wait(diverged.id)
        cancelled = client.jobs.submit(f"{tenant}/a", examples())
        assert client.jobs.cancel(cancelled.id).status is JobStatus.CANCELLED
        with pytest.raises(errors.JobCancelled):
            client.jobs.wait(cancelled.id)


def test_invalid_data_is_reported_with_every_problem(gateway: RunningGateway, tenant: str) -> None:
    with gateway.client() as client, pytest.raises(errors.DatasetInvalid) as refused:
        client.files.upload(b"[1]\n" + examples() + b"no json\n", tenant=tenant, filename="bad.jsonl")
    assert len(refused.value.problems) == 2
    assert "bad.jsonl" in refused.value.problems[0] and "14" in refused.value.problems[1]


def test_warnings_of_an_upload_are_kept(gateway: RunningGateway, tenant: str) -> None:
    with gateway.client() as client:
        file = client.files.upload(examples() + examples(1), tenant=tenant)
    assert len(file.warnings) == 1 and "train.jsonl" in file.warnings[0]
