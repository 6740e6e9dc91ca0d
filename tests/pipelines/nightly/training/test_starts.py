"""Runs that train from the champion and from new weights, on a real registry."""

from __future__ import annotations

from loramill.errors import TrainingDiverged
from loramill.pipelines.nightly.outcome import Verdict
from loramill.registry import adapters, jobs, nightly
from loramill.registry.database.tables import JobRow
from loramill.types import JobRecord, JobStatus

from ..cluster import Cluster, only, rows


def trained_jobs(cluster: Cluster) -> list[JobRecord]:
    """The jobs of the newest run, by start: that from the champion, if there is one, is the first."""
    with cluster.registry.reading() as session:
        run = nightly.list_runs(session)[0].id
        found = [job for job in jobs.list_jobs(session, tenant=None) if job.metadata.get("nightly_run") == run]
    return sorted(found, key=lambda job: job.spec.start_from is None)


def result(cluster: Cluster) -> dict:
    with cluster.registry.reading() as session:
        steps = nightly.list_steps(session, nightly.list_runs(session)[0].id)
    return next(step.result for step in steps if step.step == "train")


def with_losses(cluster: Cluster, champion: float, fresh: float) -> None:
    """Lets the pool report these validation losses."""

    def train(_: JobRecord) -> None:
        with cluster.registry.writing() as session:
            for job in jobs.list_jobs(session, tenant=None):
                session.get_one(JobRow, job.id).valid_loss = champion if job.spec.start_from else fresh
        cluster.publish(_)

    cluster.pool = train


def second_run(cluster: Cluster, start: str) -> None:
    cluster.settings.nightly_file.write_text(
        f"train: {{start: {start}, options: {{seed: 5, metadata: {{team: a}}}}}}\n"
    )
    for word in ("old", "new"):
        cluster.feed("acme/a", rows(100, word))
        champion = str(cluster.champion("acme/a") if word == "new" else None)[:12]
        cluster.right = lambda model, champion=champion: "@" in model and champion not in model
        assert only(cluster.run()).verdict is Verdict.PROMOTED, word


def test_the_better_of_two_starts_challenges_and_the_step_says_which(cluster: Cluster) -> None:
    with_losses(cluster, champion=0.5, fresh=0.25)
    second_run(cluster, "both")
    continued, fresh = trained_jobs(cluster)
    assert continued.spec.start_from is not None and fresh.spec.start_from is None
    assert result(cluster)["version"] == fresh.version == cluster.champion("acme/a")
    assert result(cluster)["choice"].startswith(
        "Trained from new weights: the validation loss is 0.5 from the champion"
    )
    assert continued.spec.seed == fresh.spec.seed == 5 and continued.metadata["team"] == "a"
    assert set(result(cluster)["jobs"]) == {"champion", "fresh"}


def test_the_challenger_alias_is_the_chosen_version(cluster: Cluster) -> None:
    with_losses(cluster, champion=0.1, fresh=0.25)
    cluster.settings.nightly_file.write_text("train: {start: both}\ngate: {min_gain: 0.5}\n")
    cluster.feed("acme/a", rows(100, "old"))
    cluster.run()
    cluster.feed("acme/a", rows(100, "new"))
    seen: list[str | None] = []
    answer = cluster.answer

    def spied(question):
        with cluster.registry.reading() as session:
            seen.append(adapters.get(session, "acme/a").challenger)
        return answer(question)

    cluster.answer = spied  # type: ignore[method-assign]
    cluster.run()
    assert seen[-1] == trained_jobs(cluster)[0].version


def test_one_start_that_fails_leaves_the_other(cluster: Cluster) -> None:
    cluster.feed("acme/a", rows(100, "old"))
    cluster.run()

    failed: list[str] = []

    def train(job: JobRecord) -> None:
        if failed:
            cluster.publish(job)
            return
        leased = cluster.lease()  # the job from the champion is the older one
        failed.append(leased.id)
        with cluster.registry.writing() as session:
            jobs.fail(session, leased.id, leased.attempt, TrainingDiverged("The loss is NaN."), retry=False)

    cluster.settings.nightly_file.write_text("train: {start: both}\n")
    cluster.pool = train
    cluster.feed("acme/a", rows(100, "new"))
    cluster.run()
    continued, fresh = trained_jobs(cluster)
    assert (continued.status, fresh.status) == (JobStatus.FAILED, JobStatus.SUCCEEDED)
    assert (
        result(cluster)["version"] == fresh.version and "the job from the champion failed" in result(cluster)["choice"]
    )


def test_new_weights_alone_get_all_data(cluster: Cluster) -> None:
    second_run(cluster, "fresh")
    (job,) = trained_jobs(cluster)
    assert job.spec.start_from is None and "replay_on_policy" not in job.metadata
    assert job.metadata["replay_plain"] == "90", "all old examples that are not held out"
