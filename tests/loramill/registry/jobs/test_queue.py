"""Jobs: the queue, its leases and its fence."""

import os
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from loramill.errors import Conflict, InvalidRequest, JobCancelled, LeaseLost, NotFound, TrainingDiverged
from loramill.names import AdapterName
from loramill.registry import Registry, adapters, datasets, jobs, tenants
from loramill.types import JobRecord, JobStatus, VersionRecord

from ....waiting import eventually


def lease(registry: Registry, *, now: float = 1000.0, seconds: float = 10.0, max_attempts: int = 3) -> JobRecord | None:
    with registry.writing() as session:
        return jobs.lease(session, "worker", now=now, seconds=seconds, max_attempts=max_attempts)


def result_of(job: JobRecord, content: str = "a") -> VersionRecord:
    return VersionRecord(
        id=content * 64, adapter=job.spec.adapter, job=job.id, base=job.spec.base, bytes=5, created_at=1.0
    )


def get(registry: Registry, job: JobRecord) -> JobRecord:
    with registry.reading() as session:
        return jobs.get(session, job.id)


@pytest.fixture
def submit(registry, make_spec):
    def submit(adapter: str = "acme/support", **changes) -> JobRecord:
        spec = make_spec(adapter, **changes)
        with registry.writing() as session:
            return jobs.submit(session, spec, {"team": "blue"})

    return submit


def test_a_job_from_submit_to_publish(registry, submit):
    job = submit()
    assert job.id.startswith("ftjob-") and job.status is JobStatus.QUEUED and job.metadata == {"team": "blue"}
    leased = lease(registry)
    assert (leased.id, leased.status, leased.attempt, leased.owner) == (job.id, JobStatus.RUNNING, 1, "worker")
    assert (leased.lease_until, leased.started_at, leased.spec) == (1010.0, 1000.0, job.spec)
    assert lease(registry) is None
    with registry.writing() as session:
        jobs.heartbeat(session, job.id, 1, jobs.JobProgress(3, 77), now=1005.0, seconds=10.0)
    with registry.writing() as session:
        jobs.add_event(session, job.id, "Step 3", kind="metrics", data={"loss": 1.5})
        done = jobs.publish(session, job.id, 1, result_of(job))
    assert done == get(registry, job)
    assert (done.status, done.version, done.step, done.trained_tokens) == (JobStatus.SUCCEEDED, "a" * 64, 5, 77)
    assert done.finished_at is not None and done.lease_until is None
    with registry.reading() as session:
        assert adapters.get(session, "acme/support").champion == "a" * 64
        events = jobs.list_events(session, job.id)
        assert jobs.list_events(session, job.id, after=events[1].id, limit=1) == events[2:3]
    assert [event.message for event in events] == [
        "Queued.",
        "Attempt 1 started by worker.",
        "Step 3",
        "Published acme/support@aaaaaaaaaaaa as champion.",
    ]
    assert events[2].data == {"loss": 1.5} and events[2].kind == "metrics"


def test_publishing_again_changes_nothing(registry, submit):
    job = submit()
    lease(registry)
    with registry.writing() as session:
        done = jobs.publish(session, job.id, 1, result_of(job))
    with registry.writing() as session:
        assert jobs.publish(session, job.id, 1, result_of(job)) == done
    with pytest.raises(LeaseLost), registry.writing() as session:
        jobs.publish(session, job.id, 1, result_of(job, "b"))
    with registry.reading() as session:
        assert (
            len(adapters.list_versions(session, "acme/support"))
            == len(adapters.alias_history(session, "acme/support"))
            == 1
        )


def test_a_second_version_is_challenger_and_the_same_content_stays_champion(registry, submit):
    for content, alias in (("a", "champion"), ("b", "challenger"), ("a", "already the champion")):
        job = submit()
        lease(registry)
        with registry.writing() as session:
            jobs.publish(session, job.id, 1, result_of(job, content))
            assert alias in jobs.list_events(session, job.id)[-1].message
            record = adapters.get(session, "acme/support")
    assert (record.champion, record.challenger) == ("a" * 64, "b" * 64)


@pytest.mark.parametrize("change", [{"adapter": "globex/support"}, {"job": None}, {"base": "f" * 64}])
def test_a_version_that_does_not_match_its_job_is_refused(registry, submit, change):
    job = submit()
    lease(registry)
    with pytest.raises(InvalidRequest), registry.writing() as session:
        jobs.publish(session, job.id, 1, result_of(job).model_copy(update=change))
    assert get(registry, job).status is JobStatus.RUNNING


def test_a_worker_that_lost_its_lease_can_change_nothing(registry, submit):
    job = submit()
    assert lease(registry).attempt == 1
    assert lease(registry, now=1009.9) is None
    assert lease(registry, now=1010.0).attempt == 2
    before = get(registry, job)
    late = [
        lambda session: jobs.heartbeat(session, job.id, 1, jobs.JobProgress(9, 9), now=1011.0, seconds=9.0),
        lambda session: jobs.publish(session, job.id, 1, result_of(job)),
        lambda session: jobs.fail(session, job.id, 1, TrainingDiverged("nan"), retry=True),
        lambda session: jobs.fail(session, job.id, 1, TrainingDiverged("nan"), retry=False),
        lambda session: jobs.release(session, job.id, 1),
    ]
    for act in late:
        with pytest.raises(LeaseLost, match=r"Attempt 1 .* at attempt 2"), registry.writing() as session:
            act(session)
    assert get(registry, job) == before
    with registry.writing() as session:
        jobs.publish(session, job.id, 2, result_of(job))
    for act in late:
        with pytest.raises(LeaseLost), registry.writing() as session:
            act(session)


def test_a_late_heartbeat_keeps_a_job_that_was_not_leased_again(registry, submit):
    job = submit()
    lease(registry)
    with registry.writing() as session:
        jobs.heartbeat(session, job.id, 1, jobs.JobProgress(1, 1), now=1500.0, seconds=10.0)
    assert lease(registry, now=1505.0) is None


def test_a_job_whose_workers_vanish_fails_in_the_end(registry, submit):
    job = submit()
    for attempt in (1, 2, 3):
        assert lease(registry, now=attempt * 100.0).attempt == attempt
    assert lease(registry, now=400.0) is None
    failed = get(registry, job)
    assert (failed.status, failed.error_code) == (JobStatus.FAILED, "job_failed")
    assert "started 3 times and its worker disappeared" in failed.error_message
    with registry.reading() as session:
        assert jobs.list_events(session, job.id)[-1].level == "error"


def test_a_failure_is_retried_until_the_attempts_are_used_up(registry, submit):
    job = submit()
    for attempt in (1, 2):
        lease(registry, max_attempts=2)
        with registry.writing() as session:
            after = jobs.fail(session, job.id, attempt, TrainingDiverged("The loss is NaN."), retry=True)
        assert after.status is (JobStatus.QUEUED if attempt == 1 else JobStatus.FAILED)
    assert (after.error_code, after.error_message) == ("training_diverged", "The loss is NaN.")
    assert lease(registry, max_attempts=2) is None


def test_a_failure_without_retry_is_final(registry, submit):
    job = submit()
    lease(registry)
    with registry.writing() as session:
        assert jobs.fail(session, job.id, 1, TrainingDiverged("NaN"), retry=False).status is JobStatus.FAILED


def test_releasing_a_job_uses_up_no_attempt_but_moves_the_fence(registry, submit):
    job = submit()
    for attempt in range(1, 7):
        assert lease(registry, max_attempts=2).attempt == attempt
        with registry.writing() as session:
            assert jobs.release(session, job.id, attempt).status is JobStatus.QUEUED
    with pytest.raises(LeaseLost), registry.writing() as session:
        jobs.heartbeat(session, job.id, 6, jobs.JobProgress(1, 1), now=1.0, seconds=1.0)
    for attempt in (7, 8):
        assert lease(registry, max_attempts=2).attempt == attempt
        with registry.writing() as session:
            after = jobs.fail(session, job.id, attempt, TrainingDiverged("NaN"), retry=True)
    assert after.status is JobStatus.FAILED


def test_a_queued_job_is_cancelled_at_once_and_never_leased(registry, submit):
    job = submit()
    with registry.writing() as session:
        assert jobs.cancel(session, job.id).status is JobStatus.CANCELLED
    assert lease(registry) is None
    with pytest.raises(Conflict, match="already cancelled"), registry.writing() as session:
        jobs.cancel(session, job.id)


def test_a_running_job_is_notified_of_its_cancellation(registry, submit):
    job = submit()
    lease(registry)
    with registry.writing() as session:
        stopping = jobs.cancel(session, job.id)
        assert jobs.cancel(session, job.id) == stopping
    assert stopping.status is JobStatus.RUNNING and stopping.pending_action == "cancel"
    with registry.writing() as session:
        beat = jobs.heartbeat(session, job.id, 1, jobs.JobProgress(2, 2), now=1001.0, seconds=10.0)
    assert beat == "cancel"
    with pytest.raises(JobCancelled) as cancelled, registry.writing() as session:
        jobs.publish(session, job.id, 1, result_of(job))
    with registry.writing() as session:
        assert jobs.fail(session, job.id, 1, cancelled.value, retry=True).status is JobStatus.CANCELLED
    with registry.reading() as session, pytest.raises(NotFound):
        adapters.get(session, "acme/support")


@pytest.mark.parametrize("end", ["expire", "release", "retry"])
def test_a_cancelled_job_does_not_start_again(registry, submit, end):
    job = submit()
    lease(registry)
    with registry.writing() as session:
        jobs.cancel(session, job.id)
    with registry.writing() as session:
        if end == "release":
            jobs.release(session, job.id, 1)
        if end == "retry":
            jobs.fail(session, job.id, 1, TrainingDiverged("NaN"), retry=True)
    assert lease(registry, now=2000.0) is None
    assert get(registry, job).status is JobStatus.CANCELLED


def test_tenants_take_turns_by_their_running_jobs(registry, submit):
    big = [submit("big/bot").id for _ in range(6)]
    small = [submit("small/bot").id for _ in range(2)]
    late = submit("late/bot").id
    with registry.reading() as session:
        assert jobs.count_open(session) == 9
    order = [lease(registry).id for _ in range(9)]
    assert order == [big[0], small[0], late, big[1], small[1], *big[2:]]


def test_a_tenant_with_a_running_job_waits_for_one_without(registry, submit):
    first, second = submit("acme/bot").id, submit("acme/bot").id
    assert lease(registry).id == first
    other = submit("globex/bot").id
    assert lease(registry).id == other
    assert lease(registry).id == second


def test_jobs_are_listed_in_pages_newest_first_and_hidden_from_others(registry, submit):
    mine = [submit().id for _ in range(3)]
    theirs = submit("globex/bot").id
    with registry.reading() as session:
        first = jobs.list_jobs(session, tenant="acme", limit=2)
        rest = jobs.list_jobs(session, tenant="acme", after=first[-1].id, limit=2)
        assert [job.id for job in first + rest] == mine[::-1]
        assert [job.id for job in jobs.list_jobs(session, tenant=None, limit=1)] == [theirs]
        with pytest.raises(NotFound):
            jobs.get(session, theirs, tenant="acme")
        with pytest.raises(NotFound):
            jobs.list_jobs(session, tenant="acme", after=theirs)


def test_a_job_uses_only_data_and_versions_of_its_tenant(registry, make_spec):
    spec, foreign = make_spec("acme/bot"), make_spec("globex/bot")
    wrong = [{"train": foreign.train}, {"valid": foreign.train}, {"start_from": "e" * 64}, {"adapter": "nobody/bot"}]
    with registry.writing() as session:
        adapters.get_or_create(session, AdapterName("globex", "bot"))
        version = VersionRecord(id="f" * 64, adapter="globex/bot", job=None, base="b" * 64, bytes=1, created_at=1.0)
        adapters.add_version(session, version)
        for change in [*wrong, {"start_from": version.id}]:
            with pytest.raises(NotFound):
                jobs.submit(session, spec.model_copy(update=change), {})
        assert jobs.submit(session, foreign.model_copy(update={"start_from": version.id}), {}).spec.start_from


def test_numbers_that_are_not_json_are_refused_on_every_database(registry, submit):
    job = submit()
    with pytest.raises(Exception, match="JSON"), registry.writing() as session:
        jobs.add_event(session, job.id, "Step 1", kind="metrics", data={"loss": float("nan")})


def test_an_unknown_job(registry):
    with registry.writing() as session:
        for act in (jobs.get, jobs.cancel):
            with pytest.raises(NotFound, match="ftjob-0"):
                act(session, "ftjob-0")
        with pytest.raises(NotFound):
            jobs.add_event(session, "ftjob-0", "?")


def queue_hundred(registry: Registry, make_spec) -> set[str]:
    specs = [make_spec(f"tenant{i % 10}/bot") for i in range(100)]
    with registry.writing() as session:
        return {jobs.submit(session, spec, {}).id for spec in specs}


def test_threads_lease_every_job_once(registry, make_spec):
    queued = queue_hundred(registry, make_spec)
    leased: list[JobRecord] = []

    def work() -> None:
        while job := lease(registry):
            leased.append(job)

    with ThreadPoolExecutor(8) as pool:
        for result in [pool.submit(work) for _ in range(8)]:
            result.result()
    assert Counter(job.id for job in leased) == Counter(queued)
    assert {job.attempt for job in leased} == {1}
    # Fair at every moment, apart from threads that are still choosing.
    for k in range(10, 101, 10):
        share = Counter(job.tenant for job in leased[:k])
        assert max(share.values()) - min(share.values(), default=0) <= 3, share


WORKER = """
import sys
from loramill.registry import Registry, jobs
from loramill.types import VersionRecord
registry = Registry.open(sys.argv[1], "memory://test")
while True:
    with registry.writing() as session:
        job = jobs.lease(session, sys.argv[2], now=1000.0, seconds=10.0, max_attempts=3)
    if job is None:
        break
    content = job.id.removeprefix("ftjob-").ljust(64, "0")
    fields = {"adapter": job.spec.adapter, "job": job.id, "base": job.spec.base, "bytes": 1, "created_at": 1.0}
    version = VersionRecord(id=content, **fields)
    with registry.writing() as session:
        jobs.publish(session, job.id, job.attempt, version)
    print(job.id)
"""


def test_processes_lease_and_publish_every_job_once(registry, make_spec, database_url):
    queued = queue_hundred(registry, make_spec)
    workers = [
        subprocess.Popen([sys.executable, "-c", WORKER, database_url, f"worker {i}"], stdout=subprocess.PIPE, text=True)
        for i in range(4)
    ]
    leased = [line for worker in workers for line in worker.communicate()[0].split()]
    assert [worker.returncode for worker in workers] == [0] * 4
    assert Counter(leased) == Counter(queued)
    with registry.reading() as session:
        for i in range(10):
            versions = adapters.list_versions(session, f"tenant{i}/bot")
            assert len(versions) == len({version.job for version in versions}) == 10
            assert adapters.get(session, f"tenant{i}/bot").champion in {version.id for version in versions}


KILLED = """
import os, signal, sys
from loramill.registry import Registry, jobs
from loramill.types import VersionRecord
registry = Registry.open(sys.argv[1], "memory://test")
with registry.writing() as session:
    job = jobs.lease(session, "worker", now=1000.0, seconds=10.0, max_attempts=3)
with registry.writing() as session:
    fields = {"adapter": job.spec.adapter, "job": job.id, "base": job.spec.base, "bytes": 1, "created_at": 1.0}
    version = VersionRecord(id="a" * 64, **fields)
    jobs.publish(session, job.id, job.attempt, version)
    print("published, not committed", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_kill_in_the_middle_of_publish_leaves_nothing_half_done(registry, submit, database_url):
    job = submit()
    killed = subprocess.run([sys.executable, "-c", KILLED, database_url], check=False, capture_output=True, text=True)
    assert (killed.returncode, killed.stdout) == (-9, "published, not committed\n"), killed.stderr
    assert get(registry, job).status is JobStatus.RUNNING
    with registry.reading() as session, pytest.raises(NotFound):
        adapters.get(session, "acme/support")
    # PostgreSQL may take a moment to see that the client is gone; until then its lock on the job remains.
    eventually(lambda: lease(registry, now=2000.0) is not None)
    assert get(registry, job).attempt == 2
    with registry.writing() as session:
        assert jobs.publish(session, job.id, 2, result_of(job)).status is JobStatus.SUCCEEDED


def test_kills_at_any_moment_lose_no_job(registry, make_spec, database_url):
    queued = queue_hundred(registry, make_spec)
    for published in (3, 20):
        worker = subprocess.Popen(
            [
                sys.executable,
                "-c",
                WORKER.replace("print(job.id)", "print(job.id, flush=True)"),
                database_url,
                "worker",
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(published):
            assert worker.stdout.readline()
        os.kill(worker.pid, 9)
        worker.communicate()
    while job := lease(registry, now=5000.0):
        with registry.writing() as session:
            jobs.publish(session, job.id, job.attempt, result_of(job, "c"))
    with registry.reading() as session:
        ended = jobs.list_jobs(session, tenant=None, limit=200)
        assert {job.id for job in ended} == queued
        assert {job.status for job in ended} == {JobStatus.SUCCEEDED}
        for job in ended:
            assert job.version in {version.id for version in adapters.list_versions(session, job.spec.adapter)}
        assert datasets.list_datasets(session, None) and tenants.list_tenants(session)
