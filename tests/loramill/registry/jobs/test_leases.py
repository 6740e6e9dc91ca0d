"""A lost worker costs a job an attempt, unless the job progressed; retries and jobs of other bases."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loramill.errors import Conflict, NotFound, OutOfMemory, QuotaExceeded, TrainingDiverged, Unavailable
from loramill.registry import Registry, adapters, datasets, jobs, tenants
from loramill.registry.jobs import queue
from loramill.registry.jobs.leases import _reclaim
from loramill.registry.jobs.queue import MAX_OUTAGE_DELAY_SECONDS
from loramill.types import JobRecord, JobSpec, JobStatus, VersionRecord

from ..conftest import FINGERPRINT

NOW = 1000.0
OTHER = "c" * 64


@pytest.fixture
def job(registry, make_spec) -> JobRecord:
    spec = make_spec("acme/bot", micro_tokens=256, steps=20_000)
    with registry.writing() as session:
        return jobs.submit(session, spec, {})


def do(registry: Registry, act, *arguments, **named):
    with registry.writing() as session:
        return act(session, *arguments, **named)


def lose(registry: Registry, job: JobRecord, steps: list[int], max_attempts: int = 3) -> list[str]:
    """For each step, leases the job, reports the step and lets the worker vanish; returns the state after each."""
    states = []
    for number, step in enumerate(steps):
        leased = do(registry, jobs.lease, "w", now=NOW, seconds=10, max_attempts=max_attempts)
        assert leased is not None, f"after {steps[:number]} it is {states[-1]}"
        do(registry, jobs.heartbeat, job.id, leased.attempt, jobs.JobProgress(step, 0), now=NOW, seconds=1)
        do(registry, jobs.reclaim_expired, now=NOW + 5, max_attempts=max_attempts)
        found = do(registry, jobs.get, job.id)
        states.append(f"{found.status}{' with half' if found.micro_tokens else ''}")
    return states


@pytest.mark.parametrize(
    ("steps", "last"),
    [
        ([1481, 2550, 8249, 11112, 13699, 15000, 16000], "queued"),
        ([10, 20, 15, 30, 25, 40, 35, 50], "queued"),
        ([100, 90, 95], "queued"),
        ([100, 90, 95, 80], "failed"),
        ([0, 5, 3, 2, 1], "failed"),
        ([0, 0], "queued with half"),
        ([7, 7], "queued with half"),
        ([7, 7, 7, 7], "failed with half"),
        ([9, 7, 7], "queued with half"),
        ([7, 8, 8, 9, 10, 11], "queued with half"),
    ],
)
def test_a_loss_costs_an_attempt_unless_the_job_progressed(registry, job, steps, last):
    assert lose(registry, job, steps)[-1] == last


def test_a_job_without_progress_fails_with_its_furthest_step(registry, job):
    lose(registry, job, [100, 90, 95, 80])
    failed = do(registry, jobs.get, job.id)
    assert failed.error_code == "job_failed"
    assert "after step 80, without getting past step 100" in failed.error_message


def lose_shared(registry: Registry, queued: list[JobRecord], step: int, owner: str) -> list[JobRecord]:
    """Lets one worker lease these jobs, report a step of each, and vanish; returns the jobs afterwards."""
    for job in queued:
        leased = do(registry, jobs.lease, owner, now=NOW, seconds=10, max_attempts=3, job_id=job.id)
        do(registry, jobs.heartbeat, job.id, leased.attempt, jobs.JobProgress(step, 0), now=NOW, seconds=1)
    do(registry, jobs.reclaim_expired, now=NOW + 5, max_attempts=3)
    return [do(registry, jobs.get, job.id) for job in queued]


def test_jobs_of_a_session_that_vanished_twice_are_tried_alone_with_all_attempts(registry, job, make_spec):
    other = do(registry, jobs.submit, make_spec("acme/bot", micro_tokens=256), {})
    assert [each.alone for each in lose_shared(registry, [job, other], 4, "w1")] == [False, False]
    again = lose_shared(registry, [job, other], 4, "w2")
    assert [(each.status, each.alone, each.micro_tokens) for each in again] == [(JobStatus.QUEUED, True, None)] * 2
    # What follows counts for this job: it needs less memory, or fails.
    assert [lose_shared(registry, [job], 4, "w3")[0].micro_tokens for _ in range(2)] == [None, 128]
    assert lose_shared(registry, [job], 4, "w3")[0].status is JobStatus.FAILED
    assert not do(registry, jobs.retry, job.id).alone


def test_a_job_without_memory_next_to_others_is_tried_alone_before_it_fails(registry, job, make_spec):
    other = do(registry, jobs.submit, make_spec("acme/bot"), {})
    do(registry, jobs.lease, "w1", now=NOW, seconds=10, max_attempts=3, job_id=other.id)
    after = []
    for attempt in (1, 2, 3):
        do(registry, jobs.lease, "w1", now=NOW, seconds=10, max_attempts=3, job_id=job.id)
        failed = do(registry, jobs.fail, job.id, attempt, OutOfMemory("no room"), retry=False)
        after.append((failed.status, failed.micro_tokens, failed.alone))
    assert after == [(JobStatus.QUEUED, 128, False), (JobStatus.QUEUED, 128, True), (JobStatus.FAILED, 128, True)]


def test_losses_of_shared_sessions_without_progress_fail_no_job(registry, job, make_spec):
    other = do(registry, jobs.submit, make_spec("acme/bot", micro_tokens=256), {})
    for step in (100, 90, 80, 70):
        after = lose_shared(registry, [job, other], step, "w1")
    assert [(each.status, each.alone) for each in after] == [(JobStatus.QUEUED, True)] * 2


def test_a_job_that_is_not_admitted_stays_queued_and_holds_back_the_next(registry, job, make_spec):
    do(registry, jobs.submit, make_spec("acme/bot"), {})
    offered = []
    admits = lambda record: offered.append(record.id)  # noqa: E731
    assert do(registry, jobs.lease, "w", now=NOW, seconds=10, max_attempts=3, admits=admits) is None
    assert offered == [job.id] and do(registry, jobs.get, job.id).status is JobStatus.QUEUED
    assert do(registry, jobs.lease, "w", now=NOW, seconds=10, max_attempts=3, admits=lambda _: True).id == job.id


class _Row:
    """The columns that `_reclaim` uses, without a database."""

    def __init__(self) -> None:
        spec = JobSpec(base="b" * 64, adapter="acme/bot", train="file-1", steps=10**6, batch_size=1)
        self.id, self.owner, self.spec = "ftjob-1", "w", spec.model_dump(mode="json")
        self.status, self.pending_action, self.micro_tokens = JobStatus.RUNNING, None, None
        self.lost_step = self.max_lost_step = None
        self.shared = self.alone = False
        self.attempt = self.returned = self.step = 0


@settings(max_examples=200)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=60), st.integers(1, 6))
def test_a_job_fails_only_if_it_makes_no_progress(steps, max_attempts):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loramill.registry.jobs.transitions.add_event", lambda *_, **__: None)
        patch.setattr(
            "loramill.registry.jobs.transitions.stop", lambda _session, row, status: setattr(row, "status", status)
        )
        row, furthest, idle = _Row(), 0, 0
        for step in steps:
            row.status, row.attempt, row.step = JobStatus.RUNNING, row.attempt + 1, step
            _reclaim(None, row, max_attempts)
            progressed = step > furthest
            furthest, idle = max(step, furthest), 0 if progressed else idle + 1
            if progressed:
                assert row.status is JobStatus.QUEUED
            assert idle <= max_attempts
            if row.status is JobStatus.FAILED:
                break


def test_release_for_an_outage_backs_off_and_costs_no_attempt(registry, job):
    delays = []
    for attempt in range(1, 12):
        now = NOW * attempt
        leased = do(registry, jobs.lease, "w", now=now, seconds=10, max_attempts=2)
        assert leased.attempt == attempt
        released = do(
            registry,
            jobs.release,
            job.id,
            attempt,
            error=Unavailable("The store is away."),
            backoff_seconds=2,
            now=now,
        )
        assert released.status is JobStatus.QUEUED
        delays.append(released.not_before - now)
        assert do(registry, jobs.lease, "w", now=released.not_before - 0.1, seconds=10, max_attempts=2) is None
    assert all(0.5 * 2 * 2**n <= delay < 1.5 * 2 * 2**n for n, delay in enumerate(delays[:4])), delays
    assert max(delays) <= 1.5 * MAX_OUTAGE_DELAY_SECONDS
    with registry.reading() as session:
        last = jobs.list_events(session, job.id)[-1]
    assert (last.level, "This uses up no attempt: The store is away." in last.message) == ("warn", True)


def test_workers_that_were_silent_in_an_outage_keep_their_jobs(registry, job):
    do(registry, jobs.lease, "w", now=NOW, seconds=10, max_attempts=3)
    assert do(registry, jobs.lease, "w2", now=NOW + 60, seconds=10, max_attempts=3, reclaim=False) is None
    do(registry, jobs.heartbeat, job.id, 1, jobs.JobProgress(1, 1), now=NOW + 61, seconds=10)
    assert do(registry, jobs.lease, "w2", now=NOW + 62, seconds=10, max_attempts=3) is None
    assert do(registry, jobs.get, job.id).attempt == 1


def fail(registry: Registry, job: JobRecord, step: int = 7) -> JobRecord:
    leased = do(registry, jobs.lease, "w", now=NOW, seconds=10, max_attempts=1)
    do(registry, jobs.heartbeat, job.id, leased.attempt, jobs.JobProgress(step, 70), now=NOW, seconds=10)
    return do(registry, jobs.fail, job.id, leased.attempt, TrainingDiverged("NaN"), retry=False)


def test_a_failed_job_is_retried_at_its_step_with_all_attempts(registry, job):
    fail(registry, job)
    again = do(registry, jobs.retry, job.id)
    assert (again.status, again.step, again.error_code, again.error_message) == (JobStatus.QUEUED, 7, None, None)
    assert again.finished_at is None
    assert lose(registry, job, [7, 8, 8])[-1] == "queued with half"
    with registry.reading() as session:
        assert "Queued again after it failed." in [event.message for event in jobs.list_events(session, job.id)]


def test_a_cancelled_job_starts_over(registry, job):
    fail_at = do(registry, jobs.lease, "w", now=NOW, seconds=10, max_attempts=1).attempt
    do(registry, jobs.heartbeat, job.id, fail_at, jobs.JobProgress(7, 70), now=NOW, seconds=10)
    do(registry, jobs.cancel, job.id)
    do(registry, jobs.release, job.id, fail_at)
    again = do(registry, jobs.retry, job.id)
    assert (again.status, again.pending_action, again.step, again.trained_tokens) == (JobStatus.QUEUED, None, 0, 0)
    assert do(registry, jobs.lease, "w", now=NOW, seconds=10, max_attempts=1).id == job.id


def test_a_job_that_cannot_be_retried_is_refused_with_the_reason(registry, job):
    with pytest.raises(NotFound):
        do(registry, jobs.retry, "ftjob-0")
    with pytest.raises(Conflict, match="is queued, neither failed nor cancelled"):
        do(registry, jobs.retry, job.id)
    do(registry, jobs.pause, job.id)
    with pytest.raises(Conflict, match=r"is paused.*jobs resume"):
        do(registry, jobs.retry, job.id)
    do(registry, jobs.resume, job.id)
    fail(registry, job)
    with pytest.raises(Conflict, match=r"is failed, not paused.*loramill jobs retry"):
        do(registry, jobs.resume, job.id)
    do(registry, tenants.set_fair_share, "acme", max_queued=0)
    with pytest.raises(QuotaExceeded):
        do(registry, jobs.retry, job.id)
    do(registry, tenants.set_fair_share, "acme", max_queued=None)
    do(registry, datasets.delete, job.spec.train)
    with pytest.raises(Conflict, match=rf"was deleted:.*{job.spec.train}.*Submit a new job"):
        do(registry, jobs.retry, job.id)
    assert do(registry, jobs.get, job.id).status is JobStatus.FAILED


def test_jobs_of_another_base_stay_queued(registry, make_spec):
    spec = make_spec("acme/bot")
    foreign = do(registry, jobs.submit, spec.model_copy(update={"base": OTHER}), {}, priority=9)
    mine = do(registry, jobs.submit, spec, {})
    with registry.reading() as session:
        startable = queue.startable_jobs(session, NOW, executor=None, limit=9, base=FINGERPRINT)
        assert [each.id for each in startable] == [mine.id]
        assert queue.count_other_bases(session, FINGERPRINT) == (1, 0)
        assert queue.count_other_bases(session, OTHER) == (1, 0)
    lease = {"now": NOW, "seconds": 10, "max_attempts": 3, "base": FINGERPRINT}
    assert do(registry, jobs.lease, "w", job_id=foreign.id, **lease) is None
    assert do(registry, jobs.lease, "w", **lease).id == mine.id
    assert do(registry, jobs.lease, "w", **lease) is None
    assert do(registry, jobs.lease, "w", **(lease | {"base": OTHER})).id == foreign.id


def test_adapters_of_other_bases_are_counted_by_their_champions(registry, make_spec):
    for name, base in (("acme/a", FINGERPRINT), ("acme/b", OTHER), ("acme/c", "d" * 64)):
        spec = make_spec(name).model_copy(update={"base": base})
        job = do(registry, jobs.submit, spec, {})
        do(registry, jobs.lease, "w", now=NOW, seconds=10, max_attempts=3)
        version = VersionRecord(id=name[-1] * 64, adapter=name, job=job.id, base=base, bytes=1, created_at=1.0)
        do(registry, jobs.publish, job.id, 1, version)
        assert do(registry, adapters.get, name).champion == version.id
    with registry.reading() as session:
        assert queue.count_other_bases(session, FINGERPRINT) == (0, 2)
        assert queue.count_other_bases(session, FINGERPRINT, [OTHER]) == (0, 1)


def test_older_jobs_get_their_base_by_migration(empty_url):
    from alembic import command

    from loramill.registry import migrate
    from loramill.registry.database.engine import for_writing, make_engine, parse_url

    migrate_to = command.upgrade
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "upgrade", lambda config, _: migrate_to(config, "0003"))
        migrate(empty_url)
    engine = make_engine(parse_url(empty_url))
    with for_writing(engine).begin() as connection:
        connection.exec_driver_sql("INSERT INTO tenants (id, name, created_at) VALUES (1, 'acme', 1)")
        connection.exec_driver_sql(
            "INSERT INTO jobs"
            " (id, tenant, spec, status, attempt, returned, step, trained_tokens, metadata, created_at) "
            f"""VALUES ('ftjob-1', 'acme', '{{"base": "{OTHER}"}}', 'queued', 0, 0, 0, 0, '{{}}', 1)"""
        )
    migrate(empty_url)
    with engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT base FROM jobs").scalar() == OTHER
    engine.dispose()
