"""Which job is next: priorities, fair shares of tokens, quotas."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from sqlalchemy import select

from loramill.errors import InvalidRequest, LoramillError, NotFound, QuotaExceeded
from loramill.registry import Registry, datasets, jobs, migrate, tenants
from loramill.registry.database.tables import TenantRow
from loramill.registry.jobs import fair_share
from loramill.types import JobRecord, JobSpec, JobStatus, VersionRecord

NOW = 1000.0


@pytest.fixture
def submit(registry: Registry, make_spec: Callable[..., JobSpec]) -> Callable[..., JobRecord]:
    def submit(tenant: str, **fields: object) -> JobRecord:
        spec = make_spec(f"{tenant}/bot")
        with registry.writing() as session:
            return jobs.submit(session, spec, {}, **fields)  # type: ignore[arg-type]

    return submit


def lease(registry: Registry, *, now: float = NOW, **fields: object) -> JobRecord | None:
    with registry.writing() as session:
        return jobs.lease(session, "w", now=now, seconds=10, max_attempts=3, **fields)  # type: ignore[arg-type]


def version_of(job: JobRecord) -> VersionRecord:
    content = job.id.removeprefix("ftjob-").ljust(64, "0")
    return VersionRecord(id=content, adapter=job.spec.adapter, job=job.id, base=job.spec.base, bytes=1, created_at=1.0)


def publish(registry: Registry, job: JobRecord, tokens: int) -> None:
    with registry.writing() as session:
        jobs.publish(session, job.id, job.attempt, version_of(job), trained_tokens=tokens)


def share(registry: Registry, tenant: str, **fields: object) -> None:
    with registry.writing() as session:
        tenants.set_fair_share(session, tenant, **fields)  # type: ignore[arg-type]


def served(registry: Registry) -> dict[str, float]:
    with registry.reading() as session:
        return {row.name: row.served for row in session.scalars(select(TenantRow))}


def test_jobs_are_ordered_by_priority_then_share_then_age(registry, submit):
    older, newer = submit("acme", cost=100), submit("acme", cost=100)
    other, urgent = submit("globex", cost=100), submit("acme", cost=100, priority=1)
    assert [lease(registry).id for _ in range(4)] == [urgent.id, other.id, older.id, newer.id]


def test_a_tenant_with_a_higher_weight_gets_more_jobs(registry, submit):
    for _ in range(4):
        submit("small", cost=100)
        submit("big", cost=100)
    share(registry, "big", weight=2.5)
    assert "".join(lease(registry).tenant[0] for _ in range(8)) == "sbbbsbss"


def test_an_idle_tenant_accumulates_no_credit(registry, submit):
    for _ in range(6):
        submit("busy", cost=100)
    submit("idle", cost=100)
    assert [lease(registry).tenant for _ in range(5)] == ["busy", "idle", "busy", "busy", "busy"]
    submit("late", cost=100)
    submit("late", cost=100)
    assert served(registry)["late"] == 100
    assert [lease(registry).tenant for _ in range(3)] == ["late", "late", "busy"]


@pytest.mark.parametrize("end", ["publish", "fail", "retry", "release", "cancel", "pause", "vanish", "vanish for good"])
def test_the_cost_of_untrained_tokens_is_refunded(registry, submit, end):
    job = submit("acme", cost=1000)
    share(registry, "acme", weight=2)
    assert lease(registry).id == job.id
    assert served(registry) == {"acme": 500}
    with registry.writing() as session:
        jobs.heartbeat(session, job.id, 1, jobs.JobProgress(3, 300), now=NOW, seconds=10)
    if end == "publish":
        publish(registry, job.model_copy(update={"attempt": 1}), 300)
    with registry.writing() as session:
        if end in ("fail", "retry"):
            jobs.fail(session, job.id, 1, LoramillError("?"), retry=end == "retry")
        if end in ("cancel", "pause"):
            getattr(jobs, end)(session, job.id)
        if end in ("release", "cancel", "pause"):
            jobs.release(session, job.id, 1)
        if end.startswith("vanish"):
            jobs.reclaim_expired(session, now=NOW + 11, max_attempts=1 if end == "vanish for good" else 3)
    assert served(registry) == {"acme": 150}
    with registry.reading() as session:
        again = jobs.get(session, job.id).status is JobStatus.QUEUED
    if again:
        assert lease(registry).attempt == 2
        assert served(registry) == {"acme": 500}


def test_a_job_of_unknown_cost_is_charged_its_maximum(registry, submit):
    job = submit("acme")
    lease(registry)
    assert served(registry) == {"acme": job.spec.steps * job.spec.batch_size * job.spec.max_length}
    publish(registry, job.model_copy(update={"attempt": 1}), 50)
    assert served(registry) == {"acme": 50}


@pytest.mark.parametrize("fields", [{"weight": 0}, {"weight": -1.0}, {"weight": float("inf")}, {"max_running": -1}])
def test_invalid_shares_are_refused(registry, submit, fields):
    submit("acme")
    with pytest.raises(InvalidRequest) as refused, registry.writing() as session:
        tenants.set_fair_share(session, "acme", **fields)
    assert refused.value.param in fields


def test_a_fair_share_is_stored_with_its_tenant(registry, submit):
    submit("acme")
    with registry.writing() as session:
        updated = tenants.set_fair_share(session, "acme", weight=2.5, max_running=3, max_queued=4)
        assert tenants.get(session, "acme") == updated
        assert (updated.weight, updated.max_running, updated.max_queued) == (2.5, 3, 4)
        with pytest.raises(NotFound):
            tenants.set_fair_share(session, "nobody")


def test_a_full_queue_refuses_jobs_until_one_starts(registry, submit):
    first = submit("acme")
    share(registry, "acme", max_queued=2)
    second = submit("acme")
    submit("globex")
    with registry.writing() as session:
        jobs.pause(session, second.id)  # a paused job counts as waiting
    with pytest.raises(QuotaExceeded, match="2 waiting jobs"):
        submit("acme")
    assert lease(registry).id == first.id
    submit("acme")


def test_concurrent_submissions_respect_the_quota(registry, submit):
    submit("acme")
    share(registry, "acme", max_queued=5)

    def one(_: int) -> bool:
        try:
            submit("acme")
        except QuotaExceeded:
            return False
        return True

    with ThreadPoolExecutor(6) as pool:
        assert Counter(pool.map(one, range(12))) == {True: 4, False: 8}


def test_concurrent_leases_respect_the_quota(registry, submit, monkeypatch):
    charge = fair_share.charge
    # Chosen but not committed: the others start.
    monkeypatch.setattr(fair_share, "charge", lambda *arguments: (time.sleep(0.1), charge(*arguments)))
    # Some lease the next job, as sessions do, and some a specific one, as trainers do.
    mine = [submit("acme", cost=10).id for _ in range(12)]
    for _ in range(5):
        submit("globex", cost=10)
    share(registry, "acme", max_running=3)
    with ThreadPoolExecutor(8) as pool:
        leased = list(pool.map(lambda job_id: lease(registry, job_id=job_id), [*mine[4:12], *[None] * 10]))
    assert Counter(job.tenant for job in leased if job) == {"acme": 3, "globex": 5}
    first = next(job for job in leased if job and job.tenant == "acme")
    with registry.writing() as session:
        jobs.release(session, first.id, first.attempt)
    assert lease(registry).tenant == "acme"
    assert lease(registry) is None
    with registry.reading() as session:
        waiting = [job for job in jobs.list_jobs(session, tenant="acme") if job.status is JobStatus.QUEUED]
    assert lease(registry, job_id=waiting[0].id) is None


WEIGHTS = st.lists(st.sampled_from([0.5, 1.0, 2.0, 3.0]), min_size=2, max_size=5)


@settings(max_examples=4, phases=[Phase.explicit, Phase.generate])
@given(weights=WEIGHTS, seed=st.integers(0, 2**32))
def test_tokens_follow_the_weights(tmp_path_factory, weights, seed):
    """Jobs of any size on four workers, some of which vanish, fail, or are preempted half-way."""
    chance, home = random.Random(seed), tmp_path_factory.mktemp("share")
    migrate(url := f"sqlite:///{home / 'loramill.db'}")
    registry = Registry.open(url, "memory://shares")
    largest = 400
    with registry.writing() as session:
        for number, weight in enumerate(weights):
            name = f"t{number}"
            tenants.create(session, name)
            tenants.set_fair_share(session, name, weight=weight)
            data = datasets.create(session, name, "train.jsonl", "d" * 64, 10, 10).id
            spec = JobSpec(base="b" * 64, adapter=f"{name}/bot", train=data, steps=1, batch_size=1)
            for _ in range(round(100 * weight / sum(weights)) + 25):
                jobs.submit(session, spec, {}, cost=chance.randint(40, largest))
    done: Counter[str] = Counter()
    running: list[JobRecord] = []
    with registry.writing() as session:
        for _ in range(100):
            while len(running) < 4:
                running.append(jobs.lease(session, "w", now=NOW, seconds=99, max_attempts=3))
            job = running.pop(chance.randrange(4))
            before = jobs.get(session, job.id).trained_tokens
            tokens = before + chance.randint(0, 100)
            jobs.heartbeat(session, job.id, job.attempt, jobs.JobProgress(1, tokens), now=NOW, seconds=99)
            if chance.random() < 0.2:
                jobs.release(session, job.id, job.attempt)
            else:
                tokens += chance.randint(0, 300)
                jobs.publish(session, job.id, job.attempt, version_of(job), trained_tokens=tokens)
            done[job.tenant] += tokens - before
    registry.close()
    total = sum(done.values())
    for number, weight in enumerate(weights):
        expected = total * weight / sum(weights)
        # 10%, plus the error of four jobs in progress and of one job too many or too few.
        assert abs(done[f"t{number}"] - expected) <= 0.1 * expected + 3 * largest, (weights, done)
