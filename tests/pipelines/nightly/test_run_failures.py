"""Failures in nightly runs: an adapter fails alone, and what is transient is tried again."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
from sqlalchemy import text

from loramill.errors import (
    InvalidRequest,
    ModelNotFound,
    NotFound,
    NotRunning,
    TrainingDiverged,
    Unavailable,
)
from loramill.models.catalog import Base
from loramill.names import AdapterName
from loramill.pipelines.nightly import run, train
from loramill.pipelines.nightly.collection import collect
from loramill.pipelines.nightly.outcome import Verdict, succeeded, summary
from loramill.registry import (
    adapters,
    datasets,
    deletion,
    jobs,
    nightly,
)
from loramill.types import JobRecord

from .cluster import Cluster, only, rows


def test_data_that_fails_is_set_aside_and_does_not_stop_others(cluster: Cluster) -> None:
    cluster.feed("acme/bad", [*rows(60), *({"prompt": f"Q {i}", "completion": "A"} for i in range(20))])
    cluster.feed("bolt/good", rows(60))
    bad, good = cluster.run()
    assert (bad.verdict, bad.stage, good.verdict) == (Verdict.FAILED, "collect", Verdict.PROMOTED)
    assert "20 of 80 rows are bad, more than 20%" in bad.reason and "loramill nightly retry acme/bad" in bad.reason
    assert not succeeded([bad, good])
    late = bad.model_copy(update={"verdict": Verdict.SKIPPED})
    assert summary([bad, late, good]) == "Nightly run: 1 promoted, 1 failed (acme/bad at collect), 1 skipped."
    assert cluster.set_aside() == {"acme/bad": "collect"} and cluster.run() == []
    with cluster.registry.writing() as session:
        nightly.retry(session, "acme/bad")
        with pytest.raises(NotFound):
            nightly.retry(session, "acme/bad")
    assert cluster.pending() == ["acme/bad"] and only(cluster.run()).verdict is Verdict.FAILED
    with cluster.registry.writing() as session:
        nightly.drop(session, "acme/bad")
        with pytest.raises(NotFound):
            nightly.drop(session, "acme/bad")
    assert cluster.set_aside() == {} and cluster.pending() == []


def test_a_bug_that_one_adapter_triggers_fails_it_alone(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    plan_training = collect.plan_training

    def broken(session, artifacts, name, *rest):
        if name.adapter == "bad":
            raise ZeroDivisionError("division by zero")
        return plan_training(session, artifacts, name, *rest)

    monkeypatch.setattr(collect, "plan_training", broken)
    cluster.feed("acme/bad", rows(60))
    cluster.feed("acme/good", rows(60))
    bad, good = cluster.run()
    assert (bad.verdict, good.verdict) == (Verdict.FAILED, Verdict.PROMOTED)
    assert bad.reason.startswith("collect: ZeroDivisionError: division by zero.")


def test_unreachable_storage_loses_no_data(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    def unavailable(*_):
        raise Unavailable("The store is away; try again.")

    cluster.feed("acme/a", rows(60))
    with monkeypatch.context() as patched:
        patched.setattr(collect, "plan_training", unavailable)
        failed = only(cluster.run())
    assert failed.verdict is Verdict.FAILED and failed.reason.endswith("Its data waits for the next nightly run.")
    assert cluster.pending() == ["acme/a"] and cluster.set_aside() == {}
    assert only(cluster.run()).verdict is Verdict.PROMOTED


def failing(cluster: Cluster, job: JobRecord) -> None:
    leased = cluster.lease()
    with cluster.registry.writing() as session:
        jobs.fail(session, leased.id, leased.attempt, TrainingDiverged("The loss is NaN."), retry=False)


def cancelling(cluster: Cluster, job: JobRecord) -> None:
    with cluster.registry.writing() as session:
        jobs.cancel(session, job.id)


def pausing(cluster: Cluster, job: JobRecord) -> None:
    if job.status == "queued":
        with cluster.registry.writing() as session:
            jobs.pause(session, job.id)


def deleting(cluster: Cluster, job: JobRecord) -> None:
    with cluster.registry.writing() as session:
        session.execute(text("delete from job_events where job = :job"), {"job": job.id})
        session.execute(text("delete from jobs where id = :job"), {"job": job.id})


@pytest.mark.parametrize(
    ("ending", "reason"),
    [
        (failing, "train: The loss is NaN."),
        (cancelling, "was cancelled."),
        (pausing, "is paused; after `loramill jobs resume"),
        (deleting, "There is no fine-tuning job"),
    ],
)
def test_a_job_that_does_not_succeed_fails_its_adapter_alone(
    cluster: Cluster, ending: Callable[[Cluster, JobRecord], None], reason: str
) -> None:
    cluster.feed("acme/bad", rows(60))
    cluster.feed("bolt/good", rows(60))
    cluster.pool = ordered(cluster, ending)
    bad, good = cluster.run()
    assert (bad.verdict, bad.stage, good.verdict) == (Verdict.FAILED, "train", Verdict.PROMOTED)
    assert reason in bad.reason and cluster.set_aside() == {"acme/bad": "train"}
    assert cluster.run() == []


def ordered(cluster: Cluster, ending: Callable[[Cluster, JobRecord], None]) -> Callable[[JobRecord], None]:
    """A pool that ends acme's job in this way, and trains the other tenant's."""

    def pool(job: JobRecord) -> None:
        if job.spec.adapter == "acme/bad":
            ending(cluster, job)
        elif job.status == "queued":
            with cluster.registry.reading() as session:
                others = [each for each in jobs.list_jobs(session, tenant="acme") if each.status == "queued"]
            if not others:
                cluster.publish(job)

    return pool


def test_an_unreachable_gateway_leaves_a_run_that_resumes(cluster: Cluster) -> None:
    cluster.feed("acme/a", rows(60))
    cluster.checks = [NotRunning("Nothing answers at http://127.0.0.1:9: start it with `loramill up`.")]
    with pytest.raises(NotRunning):
        cluster.run()
    with cluster.registry.reading() as session:
        run = nightly.list_runs(session)[0]
    stopped = only(cluster.outcomes(run.id))
    assert run.finished_at is None and stopped.verdict is Verdict.INTERRUPTED and not succeeded([stopped])
    assert (
        stopped.reason.startswith("train: Nothing answers at") and "`loramill nightly run` resumes it" in stopped.reason
    )
    assert only(cluster.run()).verdict is Verdict.PROMOTED and cluster.trained == ["acme/a"]


def test_jobs_continue_while_the_gateway_is_unreachable(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster.feed("acme/a", rows(60))
    cluster.checks = [None, *[Unavailable("The models don't answer yet.")] * 3]
    cluster.pool = lambda job: None if cluster.checks else cluster.publish(job)
    assert only(cluster.run()).verdict is Verdict.PROMOTED
    monkeypatch.setattr(train, "UNREACHABLE_SECONDS", -1.0)
    cluster.feed("acme/a", rows(60, "more"))
    cluster.pool = lambda job: None
    cluster.checks = [None, Unavailable("The models don't answer yet.")]
    with pytest.raises(Unavailable):
        cluster.run()
    cluster.pool = cluster.publish
    assert only(cluster.run()).verdict is not Verdict.FAILED and cluster.trained == ["acme/a", "acme/a"]


def test_a_champion_of_another_base_is_named_and_the_data_waits(cluster: Cluster, base: Base, monkeypatch) -> None:
    cluster.feed("acme/a", rows(60))
    cluster.run()
    cluster.feed("acme/a", rows(60, "more"))
    other = Base("other", base.folder, "0" * 64, base.architecture, base.context_length)
    with monkeypatch.context() as patched:
        patched.setattr(run, "find_base", lambda *_: other)
        failed = only(cluster.run())
    assert (
        failed.verdict is Verdict.FAILED and "another base" in failed.reason and "other (000000000000)" in failed.reason
    )
    assert cluster.pending() == ["acme/a"]
    assert only(cluster.run()).verdict is not Verdict.FAILED


def test_a_base_that_changes_during_a_run_cancels_its_jobs(cluster: Cluster, base: Base, monkeypatch) -> None:
    cluster.feed("acme/a", rows(60))
    cluster.pool = lambda job: None
    cluster.checks = [None, NotRunning("Nothing answers.")]
    with monkeypatch.context() as patched:
        patched.setattr(train, "UNREACHABLE_SECONDS", -1.0)
        with pytest.raises(NotRunning):
            cluster.run()
        other = Base("other", base.folder, "0" * 64, base.architecture, base.context_length)
        patched.setattr(run, "find_base", lambda *_: other)
        failed = only(cluster.run())
    assert failed.verdict is Verdict.FAILED and "The base has changed" in failed.reason
    assert cluster.pending() == ["acme/a"]


def test_a_version_that_is_gone_fails_its_adapter_alone(cluster: Cluster) -> None:
    cluster.feed("acme/bad", rows(60))
    cluster.feed("bolt/good", rows(60))
    cluster.refuse = {"acme/bad": ModelNotFound("The model 'acme/bad' does not exist.", param="model")}
    bad, good = cluster.run()
    assert (bad.verdict, bad.stage, good.verdict) == (Verdict.FAILED, "evaluate", Verdict.PROMOTED)
    assert cluster.set_aside() == {"acme/bad": "evaluate"}


def test_an_adapter_with_a_transient_error_is_evaluated_again_once(cluster: Cluster) -> None:
    cluster.feed("acme/bad", rows(60))
    cluster.feed("bolt/good", rows(60))
    cluster.refuse = {"acme/bad": Unavailable("The adapter can't be read now; try again.")}
    bad, good = cluster.run()
    assert (bad.verdict, bad.stage, good.verdict) == (Verdict.INTERRUPTED, "evaluate", Verdict.PROMOTED)
    bad, good = cluster.run()
    assert (bad.verdict, good.verdict) == (Verdict.FAILED, Verdict.PROMOTED)
    assert sorted(cluster.trained) == ["acme/bad", "bolt/good"], "nothing is trained twice"
    assert cluster.pending() == ["acme/bad"] and cluster.set_aside() == {}


def test_a_held_out_file_that_was_deleted_is_named(cluster: Cluster) -> None:
    cluster.feed("acme/a", rows(60))

    def pool(job: JobRecord) -> None:
        cluster.publish(job)
        with cluster.registry.writing() as session:
            (step,) = [
                step for step in nightly.list_steps(session, nightly.list_runs(session)[0].id) if step.step == "collect"
            ]
            datasets.delete(session, step.result["slices"]["new"])

    cluster.pool = pool
    failed = only(cluster.run())
    assert (failed.verdict, failed.stage) == (Verdict.FAILED, "evaluate") and "There is no file 'file-" in failed.reason


@pytest.mark.parametrize("subject", ["adapter", "tenant"])
def test_an_adapter_deleted_during_the_run_has_a_row(cluster: Cluster, subject: str) -> None:
    cluster.feed("acme/gone", rows(60))
    cluster.feed("bolt/good", rows(60))

    def pool(job: JobRecord) -> None:
        if job.spec.adapter == "acme/gone":
            with cluster.registry.writing() as session:
                if subject == "adapter":
                    deletion.delete_adapter(session, AdapterName.parse("acme/gone"), cancel_jobs=True)
                else:
                    deletion.delete_tenant(session, "acme", cancel_jobs=True)
        else:
            ordered(cluster, deleting)(job)

    cluster.pool = pool
    gone, good = cluster.run()
    assert (gone.verdict, good.verdict) == (Verdict.DELETED, Verdict.PROMOTED)
    assert gone.reason == "The adapter was deleted during the nightly run." and succeeded([gone, good])


def test_a_champion_that_changed_during_the_run_is_not_replaced(cluster: Cluster) -> None:
    for word in ("one", "two"):
        cluster.feed("acme/a", rows(60, word))
        cluster.run()
    cluster.feed("acme/a", rows(60, "three"))

    def pool(job: JobRecord) -> None:
        cluster.publish(job)
        with cluster.registry.writing() as session:
            adapters.promote(session, "acme/a", chosen, "by hand")

    with cluster.registry.reading() as session:
        chosen = next(
            v.id for v in adapters.list_versions(session, "acme/a") if v.id != adapters.get(session, "acme/a").champion
        )
    champion = cluster.champion("acme/a")
    cluster.pool = pool
    cluster.right = lambda model: "@" in model and str(champion)[:12] not in model
    held = only(cluster.run())
    assert held.verdict is Verdict.HELD and "during the run" in held.reason and cluster.champion("acme/a") == chosen


def test_quota_and_refusals_at_submission_fail_one_adapter(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(session, spec, *rest, **options):
        raise InvalidRequest("The rank is too large.")

    cluster.feed("acme/a", rows(60))
    monkeypatch.setattr(jobs, "submit", refused)
    failed = only(cluster.run())
    assert (failed.verdict, failed.stage) == (Verdict.FAILED, "train") and "The rank is too large." in failed.reason


def test_data_of_a_failed_run_is_not_known_when_it_is_retried(cluster: Cluster) -> None:
    cluster.pool = partial(failing, cluster)
    cluster.feed("acme/a", rows(12))
    assert only(cluster.run()).verdict is Verdict.FAILED
    cluster.pool = cluster.publish
    with cluster.registry.writing() as session:
        nightly.retry(session, "acme/a")
    assert only(cluster.run()).counts.train == 11
