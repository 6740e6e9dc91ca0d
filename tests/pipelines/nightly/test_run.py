"""Nightly runs end to end over a real registry, with a pool and a gateway that are functions of the test."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from sqlalchemy import text

from loramill.data.tokenizer import ChatTokenizer
from loramill.errors import (
    InvalidRequest,
    LoramillError,
    ModelNotFound,
    NotFound,
    NotRunning,
    TrainingDiverged,
    Unavailable,
)
from loramill.models.catalog import Base
from loramill.names import AdapterName
from loramill.pipelines.nightly import collect, run, train
from loramill.pipelines.nightly.context import NightlyProgress
from loramill.pipelines.nightly.outcome import Outcome, Verdict, describe, outcomes, succeeded, summary
from loramill.pipelines.nightly.questions import EvalAnswer, EvalQuestion
from loramill.pipelines.nightly.run import run_nightly
from loramill.registry import Registry, adapters, datasets, deletion, jobs, migrate, nightly, tenants
from loramill.settings import Settings
from loramill.types import JobRecord, NightlyStep, StepStatus, VersionRecord


class Mill:
    """A registry with tenants, a pool that trains whenever the gateway is checked, and that gateway."""

    def __init__(self, registry: Registry, settings: Settings) -> None:
        self.registry, self.settings = registry, settings
        self.trained: list[str] = []
        self.steps: list[NightlyStep] = []
        self.progress: list[NightlyProgress] = []
        self.pool: Callable[[JobRecord], None] = self.publish
        self.checks: list[LoramillError | None] = []
        self.refuse: dict[str, LoramillError] = {}
        self.right: Callable[[str], bool] = lambda model: "@" in model

    def run(self) -> list[Outcome]:
        self.steps.clear()
        run = run_nightly(
            self.registry,
            self.settings,
            report=self.steps.append,
            progress=self.progress.append,
            gateway=self,
        )
        return self.outcomes(run.id)

    def outcomes(self, run: str) -> list[Outcome]:
        with self.registry.reading() as session:
            deleted = [step for step in self.steps if step.result.get("deleted")]
            return outcomes([*nightly.list_steps(session, run), *deleted])

    def check(self) -> None:
        if self.checks and (error := self.checks.pop(0)) is not None:
            raise error
        with self.registry.writing() as session:
            waiting = [job for job in jobs.list_jobs(session, tenant=None) if not job.status.final]
        for job in waiting:
            self.pool(job)

    def answer_all(
        self, questions: Sequence[EvalQuestion], report: Callable[[int], None]
    ) -> list[EvalAnswer | LoramillError]:
        report(len(questions))
        return [self.answer(question) for question in questions]

    def answer(self, question: EvalQuestion) -> EvalAnswer | LoramillError:
        adapter = question.model.partition("@")[0]
        if adapter in self.refuse:
            return self.refuse[adapter]
        right = f"answer {question.messages[-1]['content']}"
        return EvalAnswer(right if self.right(question.model) else "I do not know")

    def feed(self, adapter: str, rows: Sequence[dict], valid: Sequence[dict] = ()) -> list[str]:
        name = AdapterName.parse(adapter)
        with self.registry.writing() as session:
            files = [self.file(session, name.tenant, each) for each in (rows, valid) if each]
            nightly.add_data(session, name, files[0], files[1] if valid else None)
        return files

    def file(self, session, tenant: str, rows: Sequence[dict]) -> str:
        raw = "".join(json.dumps(row) + "\n" for row in rows).encode()
        artifact = self.registry.artifacts.put({"data.jsonl": raw})
        return datasets.create(session, tenant, "rows.jsonl", artifact, len(raw), len(rows)).id

    def lease(self) -> JobRecord:
        with self.registry.writing() as session:
            job = jobs.lease(session, "worker", now=time.time(), seconds=60, max_attempts=1)
        assert job is not None
        return job

    def publish(self, _: JobRecord) -> None:
        job = self.lease()
        content = {"adapter_config.json": b"{}", "adapter_model.safetensors": job.id.encode()}
        version = VersionRecord(
            id=self.registry.artifacts.put(content),
            adapter=job.spec.adapter,
            job=job.id,
            base=job.spec.base,
            bytes=9,
            created_at=time.time(),
        )
        with self.registry.writing() as session:
            jobs.publish(session, job.id, job.attempt, version)
        self.trained.append(job.spec.adapter)

    def champion(self, adapter: str) -> str | None:
        with self.registry.reading() as session:
            return adapters.get(session, adapter).champion

    def pending(self) -> list[str]:
        with self.registry.reading() as session:
            return [each.adapter for each in nightly.pending_data(session)]

    def set_aside(self) -> dict[str, str]:
        with self.registry.reading() as session:
            return {each.adapter: each.stage for each in nightly.list_set_aside(session)}


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated database, to be copied."""
    path = tmp_path_factory.mktemp("empty") / "loramill.db"
    migrate(f"sqlite:///{path}")
    return path


@pytest.fixture
def mill(
    tmp_path: Path, empty: Path, base: Base, tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Mill]:
    settings = Settings.load(home=tmp_path)
    shutil.copyfile(empty, tmp_path / "loramill.db")
    registry = Registry.open(f"sqlite:///{tmp_path / 'loramill.db'}", (tmp_path / "artifacts").as_uri())
    with registry.writing() as session:
        for tenant in ("acme", "bolt"):
            tenants.create(session, tenant)
    monkeypatch.setattr(run, "find_base", lambda *_: base)
    monkeypatch.setattr(ChatTokenizer, "load", lambda *_: tokenizer)
    monkeypatch.setattr(train.time, "sleep", lambda seconds: None)
    yield Mill(registry, settings)
    registry.close()


def rows(count: int, word: str = "thing") -> list[dict]:
    return [
        {
            "messages": [
                {"role": "user", "content": f"{word} {i}"},
                {"role": "assistant", "content": f"answer {word} {i}"},
            ]
        }
        for i in range(count)
    ]


def only(found: list[Outcome]) -> Outcome:
    (outcome,) = found
    return outcome


def test_a_better_challenger_is_promoted_and_a_rerun_does_nothing(mill: Mill) -> None:
    mill.feed("acme/a", rows(12), rows(4, "other"))
    first = only(mill.run())
    assert (first.verdict, first.base, first.challenger) == (Verdict.PROMOTED, 0.0, 1.0)
    assert mill.run() == [] and mill.trained == ["acme/a"] and summary([]) == "No adapter had new data."
    shown = [describe(step) for step in mill.steps]
    assert shown == []
    champion = mill.champion("acme/a")
    mill.right = lambda model: str(champion)[:12] in model
    mill.feed("acme/a", rows(12, "more"))
    held = only(mill.run())
    assert (held.verdict, held.champion, held.challenger) == (Verdict.HELD, 1.0, 0.0)
    assert [describe(step) for step in mill.steps][-1] == "acme/a: held"
    assert mill.champion("acme/a") == champion and succeeded([held])
    stages = {(each.stage, each.adapter) for each in mill.progress}
    assert stages == {("train", "acme/a"), ("evaluate", None)}


def test_a_first_version_that_is_not_better_is_still_the_champion(mill: Mill) -> None:
    mill.right = lambda model: False
    mill.feed("acme/a", rows(12))
    held = only(mill.run())
    assert held.verdict is Verdict.HELD and held.reason.endswith(
        "; as the first version it is the champion all the same"
    )


@pytest.mark.parametrize(("valid", "enough"), [(0, 11), (5, 10)])
def test_little_data_waits_until_there_is_enough(mill: Mill, valid: int, enough: int) -> None:
    mill.feed("acme/a", rows(1), rows(valid, "valid"))
    for _ in range(2):
        waits = only(mill.run())
        assert waits.verdict is Verdict.WAITING and succeeded([waits]) and mill.pending() == ["acme/a"]
        assert f"at least {enough}" in waits.reason and f"add {enough - 1} more" in waits.reason
    with mill.registry.reading() as session:
        state = nightly.new_data_state(session, "acme/a", 10)
    assert (state.examples, state.validation_examples, state.enough) == (1, valid, False)
    assert state.outlook == waits.reason
    mill.feed("acme/a", rows(enough - 1, "more"))
    assert only(mill.run()).verdict is Verdict.PROMOTED
    mill.feed("acme/a", rows(2, "late"))  # with old data, two are enough: one to train on, one to evaluate on
    assert only(mill.run()).verdict in (Verdict.PROMOTED, Verdict.HELD)


def test_examples_that_are_all_the_same_wait_for_others(mill: Mill) -> None:
    mill.feed("acme/a", rows(1) * 20)
    waits = only(mill.run())
    assert waits.verdict is Verdict.WAITING and "all identical" in waits.reason


def test_data_that_fails_is_set_aside_and_stops_no_other(mill: Mill) -> None:
    mill.feed("acme/bad", [*rows(12), {"prompt": "Q", "completion": "A"}])
    mill.feed("bolt/good", rows(12))
    bad, good = mill.run()
    assert (bad.verdict, bad.stage, good.verdict) == (Verdict.FAILED, "collect", Verdict.PROMOTED)
    assert "another format" in bad.reason and "loramill nightly retry acme/bad" in bad.reason
    assert not succeeded([bad, good])
    assert summary([bad, good]) == "Nightly run: 1 promoted, 1 failed (acme/bad at collect)."
    assert mill.set_aside() == {"acme/bad": "collect"} and mill.run() == []
    with mill.registry.writing() as session:
        nightly.retry(session, "acme/bad")
        with pytest.raises(NotFound):
            nightly.retry(session, "acme/bad")
    assert mill.pending() == ["acme/bad"] and only(mill.run()).verdict is Verdict.FAILED
    with mill.registry.writing() as session:
        nightly.drop(session, "acme/bad")
        with pytest.raises(NotFound):
            nightly.drop(session, "acme/bad")
    assert mill.set_aside() == {} and mill.pending() == []


def test_a_bug_that_one_adapter_triggers_fails_it_alone(mill: Mill, monkeypatch: pytest.MonkeyPatch) -> None:
    plan_training = collect.plan_training

    def broken(session, artifacts, name, *rest):
        if name.adapter == "bad":
            raise ZeroDivisionError("division by zero")
        return plan_training(session, artifacts, name, *rest)

    monkeypatch.setattr(collect, "plan_training", broken)
    mill.feed("acme/bad", rows(12))
    mill.feed("acme/good", rows(12))
    bad, good = mill.run()
    assert (bad.verdict, good.verdict) == (Verdict.FAILED, Verdict.PROMOTED)
    assert bad.reason.startswith("collect: ZeroDivisionError: division by zero.")


def test_unreachable_storage_loses_no_data(mill: Mill, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_):
        raise Unavailable("The store is away; try again.")

    mill.feed("acme/a", rows(12))
    with monkeypatch.context() as patched:
        patched.setattr(collect, "plan_training", away)
        failed = only(mill.run())
    assert failed.verdict is Verdict.FAILED and failed.reason.endswith("Its data waits for the next nightly run.")
    assert mill.pending() == ["acme/a"] and mill.set_aside() == {}
    assert only(mill.run()).verdict is Verdict.PROMOTED


def failing(mill: Mill, job: JobRecord) -> None:
    leased = mill.lease()
    with mill.registry.writing() as session:
        jobs.fail(session, leased.id, leased.attempt, TrainingDiverged("The loss is NaN."), retry=False)


def cancelling(mill: Mill, job: JobRecord) -> None:
    with mill.registry.writing() as session:
        jobs.cancel(session, job.id)


def pausing(mill: Mill, job: JobRecord) -> None:
    if job.status == "queued":
        with mill.registry.writing() as session:
            jobs.pause(session, job.id)


def deleting(mill: Mill, job: JobRecord) -> None:
    with mill.registry.writing() as session:
        session.execute(text("delete from job_events where job = :job"), {"job": job.id})
        session.execute(text("delete from jobs where id = :job"), {"job": job.id})


@pytest.mark.parametrize(
    ("ending", "why"),
    [
        (failing, "train: The loss is NaN."),
        (cancelling, "was cancelled."),
        (pausing, "is paused; after `loramill jobs resume"),
        (deleting, "There is no fine-tuning job"),
    ],
)
def test_a_job_that_does_not_succeed_fails_its_adapter_alone(
    mill: Mill, ending: Callable[[Mill, JobRecord], None], why: str
) -> None:
    mill.feed("acme/bad", rows(12))
    mill.feed("bolt/good", rows(12))
    mill.pool = ordered(mill, ending)
    bad, good = mill.run()
    assert (bad.verdict, bad.stage, good.verdict) == (Verdict.FAILED, "train", Verdict.PROMOTED)
    assert why in bad.reason and mill.set_aside() == {"acme/bad": "train"}
    assert mill.run() == []


def ordered(mill: Mill, ending: Callable[[Mill, JobRecord], None]) -> Callable[[JobRecord], None]:
    """A pool that ends acme's job in this way, and trains the other's."""

    def pool(job: JobRecord) -> None:
        if job.spec.adapter == "acme/bad":
            ending(mill, job)
        elif job.status == "queued":
            with mill.registry.reading() as session:
                others = [each for each in jobs.list_jobs(session, tenant="acme") if each.status == "queued"]
            if not others:
                mill.publish(job)

    return pool


def test_an_unreachable_gateway_leaves_a_run_that_resumes(mill: Mill) -> None:
    mill.feed("acme/a", rows(12))
    mill.checks = [NotRunning("Nothing answers at http://127.0.0.1:9: start it with `loramill up`.")]
    with pytest.raises(NotRunning):
        mill.run()
    with mill.registry.reading() as session:
        run = nightly.list_runs(session)[0]
    stopped = only(mill.outcomes(run.id))
    assert run.finished_at is None and stopped.verdict is Verdict.INTERRUPTED and not succeeded([stopped])
    assert (
        stopped.reason.startswith("train: Nothing answers at") and "`loramill nightly run` resumes it" in stopped.reason
    )
    assert only(mill.run()).verdict is Verdict.PROMOTED and mill.trained == ["acme/a"]


def test_jobs_continue_while_the_gateway_is_unreachable(mill: Mill, monkeypatch: pytest.MonkeyPatch) -> None:
    mill.feed("acme/a", rows(12))
    mill.checks = [None, *[Unavailable("The models don't answer yet.")] * 3]
    mill.pool = lambda job: None if mill.checks else mill.publish(job)
    assert only(mill.run()).verdict is Verdict.PROMOTED
    monkeypatch.setattr(train, "UNREACHABLE_SECONDS", -1.0)
    mill.feed("acme/a", rows(12, "more"))
    mill.pool = lambda job: None
    mill.checks = [None, Unavailable("The models don't answer yet.")]
    with pytest.raises(Unavailable):
        mill.run()
    mill.pool = mill.publish
    assert only(mill.run()).verdict is not Verdict.FAILED and mill.trained == ["acme/a", "acme/a"]


def test_a_champion_of_another_base_is_named_and_the_data_waits(mill: Mill, base: Base, monkeypatch) -> None:
    mill.feed("acme/a", rows(12))
    mill.run()
    mill.feed("acme/a", rows(12, "more"))
    other = Base("other", base.folder, "0" * 64, base.architecture, base.context_length)
    with monkeypatch.context() as patched:
        patched.setattr(run, "find_base", lambda *_: other)
        failed = only(mill.run())
    assert (
        failed.verdict is Verdict.FAILED and "another base" in failed.reason and "other (000000000000)" in failed.reason
    )
    assert mill.pending() == ["acme/a"]
    assert only(mill.run()).verdict is not Verdict.FAILED


def test_a_base_that_changes_during_a_run_cancels_its_jobs(mill: Mill, base: Base, monkeypatch) -> None:
    mill.feed("acme/a", rows(12))
    mill.pool = lambda job: None
    mill.checks = [None, NotRunning("Nothing answers.")]
    with monkeypatch.context() as patched:
        patched.setattr(train, "UNREACHABLE_SECONDS", -1.0)
        with pytest.raises(NotRunning):
            mill.run()
        other = Base("other", base.folder, "0" * 64, base.architecture, base.context_length)
        patched.setattr(run, "find_base", lambda *_: other)
        failed = only(mill.run())
    assert failed.verdict is Verdict.FAILED and "The base has changed" in failed.reason
    assert mill.pending() == ["acme/a"]


def test_a_version_that_is_gone_fails_its_adapter_alone(mill: Mill) -> None:
    mill.feed("acme/bad", rows(12))
    mill.feed("bolt/good", rows(12))
    mill.refuse = {"acme/bad": ModelNotFound("The model 'acme/bad' does not exist.", param="model")}
    bad, good = mill.run()
    assert (bad.verdict, bad.stage, good.verdict) == (Verdict.FAILED, "evaluate", Verdict.PROMOTED)
    assert mill.set_aside() == {"acme/bad": "evaluate"}


def test_an_adapter_with_a_transient_error_is_evaluated_again_once(mill: Mill) -> None:
    mill.feed("acme/bad", rows(12))
    mill.feed("bolt/good", rows(12))
    mill.refuse = {"acme/bad": Unavailable("The adapter can't be read now; try again.")}
    bad, good = mill.run()
    assert (bad.verdict, bad.stage, good.verdict) == (Verdict.INTERRUPTED, "evaluate", Verdict.PROMOTED)
    bad, good = mill.run()
    assert (bad.verdict, good.verdict) == (Verdict.FAILED, Verdict.PROMOTED)
    assert sorted(mill.trained) == ["acme/bad", "bolt/good"], "nothing is trained twice"
    assert mill.pending() == ["acme/bad"] and mill.set_aside() == {}


def test_a_held_out_file_that_was_deleted_is_named(mill: Mill) -> None:
    mill.feed("acme/a", rows(12))

    def pool(job: JobRecord) -> None:
        mill.publish(job)
        with mill.registry.writing() as session:
            (step,) = [
                step for step in nightly.list_steps(session, nightly.list_runs(session)[0].id) if step.step == "collect"
            ]
            datasets.delete(session, step.result["slices"]["new"])

    mill.pool = pool
    failed = only(mill.run())
    assert (failed.verdict, failed.stage) == (Verdict.FAILED, "evaluate") and "There is no file 'file-" in failed.reason


@pytest.mark.parametrize("what", ["adapter", "tenant"])
def test_an_adapter_deleted_during_the_run_has_a_row(mill: Mill, what: str) -> None:
    mill.feed("acme/gone", rows(12))
    mill.feed("bolt/good", rows(12))

    def pool(job: JobRecord) -> None:
        if job.spec.adapter == "acme/gone":
            with mill.registry.writing() as session:
                if what == "adapter":
                    deletion.delete_adapter(session, AdapterName.parse("acme/gone"), cancel_jobs=True)
                else:
                    deletion.delete_tenant(session, "acme", cancel_jobs=True)
        else:
            ordered(mill, deleting)(job)

    mill.pool = pool
    gone, good = mill.run()
    assert (gone.verdict, good.verdict) == (Verdict.DELETED, Verdict.PROMOTED)
    assert gone.reason == "The adapter was deleted during the nightly run." and succeeded([gone, good])


def test_a_champion_that_changed_during_the_run_is_not_replaced(mill: Mill) -> None:
    for word in ("one", "two"):
        mill.feed("acme/a", rows(12, word))
        mill.run()
    mill.feed("acme/a", rows(12, "three"))

    def pool(job: JobRecord) -> None:
        mill.publish(job)
        with mill.registry.writing() as session:
            adapters.promote(session, "acme/a", chosen, "by hand")

    with mill.registry.reading() as session:
        chosen = next(
            v.id for v in adapters.list_versions(session, "acme/a") if v.id != adapters.get(session, "acme/a").champion
        )
    champion = mill.champion("acme/a")
    mill.pool = pool
    mill.right = lambda model: "@" in model and str(champion)[:12] not in model
    held = only(mill.run())
    assert held.verdict is Verdict.HELD and "during the run" in held.reason and mill.champion("acme/a") == chosen


def test_quota_and_refusals_at_submission_fail_one_adapter(mill: Mill, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(session, spec, *rest, **options):
        raise InvalidRequest("The rank is too large.")

    mill.feed("acme/a", rows(12))
    monkeypatch.setattr(jobs, "submit", refused)
    failed = only(mill.run())
    assert (failed.verdict, failed.stage) == (Verdict.FAILED, "train") and "The rank is too large." in failed.reason


def test_old_runs_whose_failure_has_no_reason_are_shown(mill: Mill) -> None:
    step = NightlyStep(run="night-1", adapter="acme/a", step="train", status=StepStatus.FAILED, result={})
    assert only(outcomes([step])).reason == "train: no reason was recorded."
