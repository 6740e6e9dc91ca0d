"""Jobs that are paused, preempted, retried, or run out of memory; their checkpoints; worker slots."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from loramill.errors import Conflict, LeaseLost, NotFound, OutOfMemory, TrainingDiverged, Unavailable
from loramill.registry import Registry, adapters, jobs
from loramill.registry.jobs import checkpoints, worker_slots
from loramill.registry.jobs.queue import MAX_BACKOFF_SECONDS, backoff_delay
from loramill.types import JobRecord, JobStatus, VersionRecord

NOW = 1000.0


@pytest.fixture
def job(registry, make_spec) -> JobRecord:
    spec = make_spec("acme/bot", micro_tokens=256)
    with registry.writing() as session:
        return jobs.submit(session, spec, {})


def lease(registry: Registry, now: float = NOW, max_attempts: int = 3, **fields: object) -> JobRecord | None:
    with registry.writing() as session:
        return jobs.lease(session, "w", now=now, seconds=10, max_attempts=max_attempts, **fields)


def do(registry: Registry, act, *arguments, **named):
    with registry.writing() as session:
        return act(session, *arguments, **named)


def beat(registry: Registry, job: JobRecord, attempt: int = 1, step: int = 0, **metrics: float):
    progress = jobs.JobProgress(step, 10 * step, **metrics)
    return do(registry, jobs.heartbeat, job.id, attempt, progress, now=NOW, seconds=10)


def test_a_waiting_job_pauses_at_once_and_resumes(registry, job):
    assert do(registry, jobs.pause, job.id).status is JobStatus.PAUSED
    assert do(registry, jobs.pause, job.id).status is JobStatus.PAUSED
    assert lease(registry) is None
    assert do(registry, jobs.resume, job.id).status is JobStatus.QUEUED
    with pytest.raises(Conflict, match="not paused"):
        do(registry, jobs.resume, job.id)
    assert lease(registry).id == job.id


def test_a_running_job_pauses_when_its_worker_releases_it(registry, job):
    lease(registry)
    assert do(registry, jobs.pause, job.id).status is JobStatus.RUNNING
    assert beat(registry, job, step=2) == "pause"
    released = do(registry, jobs.release, job.id, 1)
    assert (released.status, released.pending_action, released.step) == (JobStatus.PAUSED, None, 2)
    do(registry, jobs.resume, job.id)
    again = lease(registry, max_attempts=1)
    assert (again.attempt, again.pending_action) == (2, None)
    # The pause used up no attempt: this one may still fail once.
    assert do(registry, jobs.fail, job.id, 2, Unavailable("?"), retry=True).status is JobStatus.FAILED


def test_a_withdrawn_pause_changes_nothing(registry, job):
    lease(registry)
    do(registry, jobs.pause, job.id)
    assert do(registry, jobs.resume, job.id).pending_action is None
    assert beat(registry, job) is None


@pytest.mark.parametrize("end", ["vanish", "retry"])
def test_a_job_with_a_pending_pause_does_not_start_again(registry, job, end):
    lease(registry)
    do(registry, jobs.pause, job.id)
    if end == "retry":
        do(registry, jobs.fail, job.id, 1, Unavailable("?"), retry=True)
    assert lease(registry, now=NOW + 100) is None
    assert do(registry, jobs.get, job.id).status is JobStatus.PAUSED


def test_cancel_wins_over_pause(registry, job):
    lease(registry)
    do(registry, jobs.pause, job.id)
    do(registry, jobs.cancel, job.id)
    with pytest.raises(Conflict, match="being cancelled"):
        do(registry, jobs.pause, job.id)
    assert do(registry, jobs.release, job.id, 1).status is JobStatus.CANCELLED
    for act in (jobs.pause, jobs.resume):
        with pytest.raises(Conflict):
            do(registry, act, job.id)


def test_a_paused_job_can_be_cancelled(registry, job):
    do(registry, jobs.pause, job.id)
    assert do(registry, jobs.cancel, job.id).status is JobStatus.CANCELLED


def test_a_preempted_job_resumes_later(registry, job):
    lease(registry)
    assert not do(registry, jobs.preempt, job.id, 2)
    assert do(registry, jobs.preempt, job.id, 1)
    assert not do(registry, jobs.preempt, job.id, 1)
    assert not do(registry, jobs.preempt, "ftjob-0", 1)
    assert beat(registry, job) == "preempt"
    released = do(registry, jobs.release, job.id, 1)
    assert (released.status, released.pending_action) == (JobStatus.QUEUED, None)
    assert lease(registry, max_attempts=1).attempt == 2


def test_a_retry_waits_twice_as_long_each_time(registry, job):
    delays = []
    for attempt in (1, 2, 3):
        assert lease(registry, now=NOW * attempt, max_attempts=9).attempt == attempt
        failed = do(
            registry, jobs.fail, job.id, attempt, Unavailable("?"), retry=True, backoff_seconds=8, now=NOW * attempt
        )
        delays.append(failed.not_before - NOW * attempt)
        assert lease(registry, now=failed.not_before - 0.1) is None
    assert all(0.5 * 8 * 2**n <= delay < 1.5 * 8 * 2**n for n, delay in enumerate(delays)), delays


def test_backoff_is_a_function_of_job_and_attempt():
    assert backoff_delay(2, 1, "a", 1) == backoff_delay(2, 1, "a", 1)
    assert len({backoff_delay(2, 1, name, attempt) for name in "abc" for attempt in (1, 2)}) == 6
    assert backoff_delay(0, 5, "a", 5) == 0
    assert backoff_delay(2, 10**6, "a", 1) <= 1.5 * MAX_BACKOFF_SECONDS


def test_out_of_memory_is_retried_once_with_half_the_tokens(registry, job):
    for attempt, micro_tokens in ((1, None), (2, 128)):
        leased = lease(registry, max_attempts=1)
        assert (leased.attempt, leased.micro_tokens) == (attempt, micro_tokens)
        after = do(registry, jobs.fail, job.id, attempt, OutOfMemory("no room"), retry=False)
    assert (after.status, after.error_code, after.error_message) == (JobStatus.FAILED, "out_of_memory", "no room")


def test_workers_that_vanish_twice_at_the_same_step_ran_out_of_memory(registry, job):
    for attempt, step, micro_tokens in ((1, 3, None), (2, 4, None), (3, 4, None), (4, 4, 128), (5, 4, 128)):
        leased = lease(registry, now=NOW * attempt, max_attempts=9)
        assert (leased.attempt, leased.micro_tokens) == (attempt, micro_tokens)
        do(registry, jobs.heartbeat, job.id, attempt, jobs.JobProgress(step, 0), now=NOW * attempt, seconds=1)
    assert lease(registry, now=NOW * 6, max_attempts=9) is None
    failed = do(registry, jobs.get, job.id)
    assert (failed.status, failed.error_code) == (JobStatus.FAILED, "out_of_memory")
    assert "after step 4" in failed.error_message


def test_a_running_job_has_metrics(registry, job):
    lease(registry)
    beat(registry, job, step=1, loss=2.0, valid_loss=3.0, tokens_per_second=50.0)
    beat(registry, job, step=2, loss=1.5)
    now = do(registry, jobs.get, job.id)
    assert (now.loss, now.valid_loss, now.tokens_per_second) == (1.5, 3.0, 50.0)
    assert do(registry, jobs.release, job.id, 1).tokens_per_second is None


def test_executors_lease_only_their_own_jobs(registry, make_spec):
    spec = make_spec("acme/bot")
    long = do(registry, jobs.submit, spec, {}, executor="dedicated", priority=5)
    short = do(registry, jobs.submit, spec, {})
    assert lease(registry, executor="dedicated", job_id=short.id).id == short.id
    assert lease(registry, executor="session") is None
    assert lease(registry, executor="dedicated").id == long.id
    assert lease(registry, job_id=long.id) is None


def version(job: JobRecord, content: str) -> VersionRecord:
    return VersionRecord(
        id=content * 64, adapter=job.spec.adapter, job=job.id, base=job.spec.base, bytes=5, created_at=1.0
    )


def test_only_the_newest_checkpoints_keep_their_versions(registry, job):
    lease(registry)
    for step, content in enumerate("abcde", start=1):
        do(registry, checkpoints.add, job.id, 1, step, version(job, content), {"step": step, "train_loss": 1 / step})
    found = do(registry, checkpoints.list_checkpoints, job.id)
    assert [(point.step, point.version and point.version[0]) for point in found] == [
        (5, "e"),
        (4, "d"),
        (3, "c"),
        (2, None),
        (1, None),
    ]
    assert found[0].metrics == {"step": 5, "train_loss": 0.2}
    page = do(registry, checkpoints.list_checkpoints, job.id, after=found[1].id, limit=2)
    assert page == found[2:4]
    with pytest.raises(NotFound):
        do(registry, checkpoints.list_checkpoints, job.id, after="ftckpt-0")
    with registry.reading() as session:
        assert {found.id[0] for found in adapters.list_versions(session, "acme/bot")} == set("cde")
        assert adapters.get(session, "acme/bot").champion is None
        assert adapters.resolve(session, "acme/bot", "c" * 64).job == job.id
    done = do(registry, jobs.publish, job.id, 1, version(job, "d"))
    assert done.version == "d" * 64
    with registry.reading() as session:
        assert adapters.get(session, "acme/bot").champion == "d" * 64


def test_a_checkpoint_that_an_alias_points_to_keeps_its_version(registry, make_spec):
    spec = make_spec("acme/bot")
    first, second = (do(registry, jobs.submit, spec, {}) for _ in range(2))
    lease(registry, job_id=first.id)
    do(registry, checkpoints.add, first.id, 1, 1, version(first, "a"), {})
    lease(registry, job_id=second.id)
    do(registry, jobs.publish, second.id, 1, version(second, "b"))
    do(registry, adapters.promote, "acme/bot", "a" * 64, "it is good already")
    for step, content in enumerate("cdef", start=2):
        do(registry, checkpoints.add, first.id, 1, step, version(first, content), {})
    with registry.reading() as session:
        assert {found.id[0] for found in adapters.list_versions(session, "acme/bot")} == set("abdef")


def test_the_ranks_of_champions_are_those_of_their_jobs(registry, make_spec):
    for adapter, rank, content in (("acme/bot", 8, "a"), ("acme/bot", 64, "b"), ("acme/other", 4, "c")):
        job = do(registry, jobs.submit, make_spec(adapter, rank=rank), {})
        lease(registry, job_id=job.id)
        do(registry, jobs.publish, job.id, 1, version(job, content))
    base = version(job, "a").base
    # The job of rank 64 has made a challenger.
    assert do(registry, adapters.champion_ranks, base) == (4, 8)
    do(registry, adapters.promote, "acme/bot", "b" * 64, "better")
    imported = version(job, "d").model_copy(update={"job": None, "adapter": "acme/other"})
    do(registry, adapters.add_version, imported)
    do(registry, adapters.promote, "acme/other", "d" * 64, "imported")
    assert do(registry, adapters.champion_ranks, base) == (64,)
    assert do(registry, adapters.champion_ranks, "0" * 64) == ()


def test_a_repeated_step_replaces_its_checkpoint(registry, job):
    lease(registry)
    do(registry, checkpoints.add, job.id, 1, 1, version(job, "a"), {"step": 1})
    lease(registry, now=NOW + 60)
    with pytest.raises(LeaseLost):
        do(registry, checkpoints.add, job.id, 1, 2, version(job, "b"), {})
    do(registry, checkpoints.add, job.id, 2, 1, version(job, "a"), {"step": 1})
    assert [point.step for point in do(registry, checkpoints.list_checkpoints, job.id)] == [1]


def test_a_failure_keeps_its_checkpoints(registry, job):
    lease(registry)
    do(registry, checkpoints.add, job.id, 1, 1, None, {"step": 1})
    do(registry, jobs.fail, job.id, 1, TrainingDiverged("NaN"), retry=False)
    assert [point.version for point in do(registry, checkpoints.list_checkpoints, job.id)] == [None]


def test_a_worker_slot_has_one_holder(registry):
    def claim(name: str, holder: str, now: float = NOW) -> bool:
        return do(registry, worker_slots.claim, name, holder, now=now, seconds=5, size=2)

    assert claim("session-1", "a") and claim("session-2", "a")
    assert not claim("session-1", "b") and not claim("session-1", "a")
    do(registry, worker_slots.renew, "a", ["session-1"], now=NOW + 1, seconds=5)
    with registry.reading() as session:
        assert [(slot.name, slot.size) for slot in worker_slots.list_held(session, NOW + 1)] == [("session-1", 2)]
        assert worker_slots.is_open(session, "session-1", "a") and not worker_slots.is_open(session, "session-1", "b")
    do(registry, worker_slots.request_end, "session-1")
    with registry.reading() as session:
        assert not worker_slots.is_open(session, "session-1", "a")
    assert claim("session-1", "b", NOW + 7)
    with registry.reading() as session:
        assert worker_slots.is_open(session, "session-1", "b") and not worker_slots.is_open(session, "session-1", "a")


def test_one_of_many_concurrent_claims_is_granted(registry):
    with ThreadPoolExecutor(6) as pool:
        granted = list(
            pool.map(lambda n: do(registry, worker_slots.claim, "session-1", str(n), now=NOW, seconds=5), range(12))
        )
    assert sum(granted) == 1
