"""Deleting: what is removed, what stays, and what is refused; on both databases."""

import os
import signal
import subprocess
import sys
import time

import pytest
from sqlalchemy import select

from loramill.errors import Conflict, LeaseLost, NotFound
from loramill.names import AdapterName
from loramill.registry import (
    Registry,
    adapters,
    api_keys,
    audit,
    datasets,
    deletion,
    evaluations,
    jobs,
    nightly,
    renaming,
    tenants,
    usage,
)
from loramill.registry.database.tables import AuditRow, KeyRow, TableBase, TenantRow
from loramill.registry.jobs import checkpoints
from loramill.types import Alias, JobStatus, Limits, RateWindow, StepStatus, VersionRecord

NAME = AdapterName("acme", "support")


def published(registry: Registry, make_spec, content: bytes, adapter: str = "acme/support") -> tuple[str, str]:
    """A version with a job, a checkpoint, an evaluation and full weights; returns (version, job)."""
    version, result = registry.artifacts.put({"a": content}), registry.artifacts.put({"whole": content})
    spec = make_spec(adapter)
    with registry.writing() as session:
        job = jobs.submit(session, spec, {})
        leased = jobs.lease(session, "w", now=time.time(), seconds=60, max_attempts=3, job_id=job.id)
        assert leased is not None
        record = VersionRecord(id=version, adapter=adapter, job=job.id, base=spec.base, bytes=1, created_at=time.time())
        checkpoints.add(session, job.id, leased.attempt, 2, record, {"valid_loss": 1.0})
        jobs.publish(session, job.id, leased.attempt, record, result=result)
        evaluations.add(session, adapter, version, "file-x", "new", 3, {"exact_match": 1.0})
    return version, job.id


def rows(registry: Registry, without: tuple[str, ...] = ("audit", "usage")) -> dict[str, int]:
    """Number of rows per table, without the empty tables."""
    with registry.reading() as session:
        counts = {
            table.name: len(session.execute(select(table)).all())
            for table in TableBase.metadata.sorted_tables
            if table.name not in without
        }
    return {name: count for name, count in counts.items() if count}


def test_an_adapter_is_deleted_with_its_own_rows_and_no_others(registry, make_spec):
    published(registry, make_spec, b"other", "globex/support")
    before = rows(registry)
    first, _ = published(registry, make_spec, b"1")
    second, _ = published(registry, make_spec, b"2")
    with registry.writing() as session:
        nightly.add_data(session, NAME, make_spec().train, None)
        run = nightly.open_run(session)
        nightly.record_step(session, run.id, NAME, "collect", StepStatus.DONE, {})
        nightly.finish_run(session, run.id)
        removed = deletion.delete_adapter(session, NAME)
    assert (removed.versions, removed.jobs, removed.cancelled) == (2, 2, ())
    left = rows(registry)
    # The tenant and its file stay; the nightly run itself belongs to no tenant.
    assert left == before | {"tenants": 2, "datasets": 2, "nightly_runs": 1}
    with registry.writing() as session:
        with pytest.raises(NotFound):
            deletion.delete_adapter(session, NAME)
        for version in (first, second):
            with pytest.raises(NotFound):
                adapters.get_version(session, version)
    assert registry.remove_unreferenced(older_than=-1) == 4


def test_artifacts_that_another_tenant_has_too_survive_the_sweep(registry, make_spec):
    version, _ = published(registry, make_spec, b"equal")
    twin, _ = published(registry, make_spec, b"equal", "globex/bot")
    assert version == twin
    with registry.writing() as session:
        deletion.delete_tenant(session, "acme")
    assert registry.remove_unreferenced(older_than=-1) == 0
    with registry.writing() as session:
        assert adapters.resolve(session, "globex/bot", "champion").id == version
    assert registry.artifacts.read(version, "a") == b"equal"
    with registry.writing() as session:
        deletion.delete_adapter(session, "globex/bot")
    assert registry.remove_unreferenced(older_than=-1) == 2


def test_an_open_job_is_named_or_cancelled(registry, make_spec):
    own, other = make_spec(), make_spec("acme/sales")
    with registry.writing() as session:
        adapters.get_or_create(session, NAME)
        queued, running = jobs.submit(session, own, {}), jobs.submit(session, own, {})
        leased = jobs.lease(session, "w", now=time.time(), seconds=60, max_attempts=3, job_id=running.id)
        elsewhere = jobs.submit(session, other, {})
    with pytest.raises(Conflict) as refused, registry.writing() as session:
        deletion.delete_adapter(session, NAME)
    assert queued.id in refused.value.message and running.id in refused.value.message
    assert elsewhere.id not in refused.value.message
    with registry.writing() as session:
        removed = deletion.delete_adapter(session, NAME, cancel_jobs=True)
    assert set(removed.cancelled) == {queued.id, running.id}
    # The next heartbeat of its worker reports the deletion; the worker can publish nothing.
    with pytest.raises(LeaseLost), registry.writing() as session:
        jobs.heartbeat(session, running.id, leased.attempt, jobs.JobProgress(1, 1), now=time.time(), seconds=60)
    version = VersionRecord(id="a" * 64, adapter="acme/support", job=running.id, base="b" * 64, bytes=1, created_at=1.0)
    for act in (
        lambda session: jobs.publish(session, running.id, leased.attempt, version),
        lambda session: checkpoints.add(session, running.id, leased.attempt, 1, version, {}),
        lambda session: jobs.fail(session, running.id, leased.attempt, NotFound("x"), retry=True),
        lambda session: jobs.release(session, running.id, leased.attempt),
    ):
        with pytest.raises(LeaseLost), registry.writing() as session:
            act(session)
    with registry.reading() as session:
        assert jobs.get(session, elsewhere.id).status is JobStatus.QUEUED
        assert [each.name for each in adapters.list_adapters(session, "acme")] == []
        assert tenants.job_counts(session) == {"acme": (0, 1)}


def test_a_version_is_deleted_unless_an_alias_points_to_it(registry, make_spec):
    first, first_job = published(registry, make_spec, b"1")
    second, _ = published(registry, make_spec, b"2")
    third, _ = published(registry, make_spec, b"3")
    with registry.writing() as session:
        adapters.promote(session, NAME, second, "better")
    for version, message in ((second, "is the champion"), (first, "previous champion"), (third, "challenger")):
        with pytest.raises(Conflict, match=message), registry.writing() as session:
            deletion.delete_version(session, NAME, version)
    with pytest.raises(Conflict, match="is the champion"), registry.writing() as session:
        deletion.delete_version(session, NAME, second, force=True)
    with registry.writing() as session:
        moves = len(adapters.alias_history(session, NAME))
        deletion.delete_version(session, NAME, first, force=True)
    with registry.writing() as session:
        record = adapters.get(session, NAME)
        assert (record.champion, record.challenger, record.previous) == (second, third, None)
        history = adapters.alias_history(session, NAME)
        assert len(history) == moves + 1 and first not in {move.version for move in history}
        assert f"({first[:12]}, since deleted)" in history[-1].reason
        assert [row.version for row in evaluations.list_evaluations(session, NAME)] == [third, second]
        assert jobs.get(session, first_job).result is None
        assert [row.version for row in checkpoints.list_checkpoints(session, first_job)] == [None]
        with pytest.raises(NotFound):
            deletion.delete_version(session, NAME, first)
    assert registry.remove_unreferenced(older_than=-1) == 2


def test_a_version_that_a_job_starts_from_is_kept(registry, make_spec):
    first, _ = published(registry, make_spec, b"1")
    second, _ = published(registry, make_spec, b"2")
    with registry.writing() as session:
        adapters.promote(session, NAME, second, "better")
        adapters.move(session, NAME, Alias.PREVIOUS, None, "not needed")
        job = jobs.submit(session, make_spec(start_from=first), {})
    with pytest.raises(Conflict, match=job.id), registry.writing() as session:
        deletion.delete_version(session, NAME, first)
    with registry.writing() as session:
        jobs.cancel(session, job.id)
        deletion.delete_version(session, NAME, first)


def test_rows_that_outlive_a_tenant_do_not_contain_its_name(registry, make_spec):
    published(registry, make_spec, b"other", "globex/support")
    with registry.writing() as session:
        _, key = api_keys.create(session, "globex")
    before = rows(registry)
    published(registry, make_spec, b"1")
    with registry.writing() as session:
        own, secret = api_keys.create(session, "acme")
        tenants.set_limits(session, "acme", Limits(requests_per_minute=5))
        nightly.add_data(session, NAME, make_spec().train, None)
        for tenant in ("acme", "globex"):
            for action, subject in (
                ("adapter.promote", f"{tenant}/support"),
                ("file.create", "file-000000000000000000000000"),
                ("tenant.limits", tenant),
            ):
                audit.record(
                    session,
                    tenant=tenant,
                    actor=tenant,
                    key=own.id,
                    action=action,
                    subject=subject,
                    request="r",
                    details_of=f"{tenant} Ltd",
                )
            for day, model, version in (
                ("2026-01-01", f"{tenant}/support", "v1"),
                ("2026-01-01", f"{tenant}/x", "v2"),
                ("2026-01-01", "base", ""),
                ("2026-01-02", "base", ""),
            ):
                counts = {usage.UsageItem(tenant, day, model, version): usage.UsageCount(1, 10, 100)}
                usage.add(session, counts)
        usage.record_batch(session, "gateway-1", 1, {}, {"acme": RateWindow(1, requests=1)}, now=1.0)
        waiting = jobs.submit(session, make_spec(), {})
    with pytest.raises(Conflict, match=waiting.id), registry.writing() as session:
        deletion.delete_tenant(session, "acme")
    with registry.writing() as session:
        removed = deletion.delete_tenant(session, "acme", cancel_jobs=True)
    assert (removed.versions, removed.jobs, removed.files, removed.cancelled) == (1, 2, 1, (waiting.id,))
    assert rows(registry) == before | {"gateways": 1}
    with registry.reading() as session:
        assert "acme" not in str(
            [[str(row) for row in session.execute(select(table)).all()] for table in TableBase.metadata.sorted_tables]
        )
        kept = session.scalars(select(AuditRow).where(AuditRow.tenant.is_(None))).all()
        assert {(row.action, row.subject, row.actor, row.key) for row in kept} == {
            ("adapter.promote", "(deleted)", "(deleted)", own.id),
            ("file.create", "file-000000000000000000000000", "(deleted)", own.id),
            ("tenant.limits", "(deleted)", "(deleted)", own.id),
        }
        assert all(row.details == {} for row in kept)
        sums = {(row.day, row.tenant, row.model): row.requests for row in usage.daily(session, None, "2026", "2027")}
        assert sums == {
            ("2026-01-02", "(deleted)", "base"): 1,
            ("2026-01-01", "(deleted)", "(deleted)"): 2,
            ("2026-01-01", "(deleted)", "base"): 1,
            ("2026-01-02", "globex", "base"): 1,
            ("2026-01-01", "globex", "base"): 1,
            ("2026-01-01", "globex", "globex/support"): 1,
            ("2026-01-01", "globex", "globex/x"): 1,
        }
        assert len(audit.list_changes(session, "globex")) == 3
        api_keys.authenticate(session, key)
        with pytest.raises(Exception, match="unknown"):
            api_keys.authenticate(session, secret)
        with pytest.raises(NotFound):
            tenants.get(session, "acme")


def test_a_new_tenant_of_the_same_name_inherits_nothing(registry, make_spec):
    published(registry, make_spec, b"1")
    with registry.writing() as session:
        audit.record(session, tenant="acme", actor=None, key="k", action="tenant.create", subject="acme", request="r")
        deletion.delete_tenant(session, "acme")
        tenants.create(session, "acme")
    with registry.reading() as session:
        assert (adapters.list_adapters(session, "acme"), audit.list_changes(session, "acme")) == ([], [])
        assert (datasets.list_datasets(session, "acme"), jobs.list_jobs(session, tenant="acme")) == ([], [])


def test_usage_that_a_gateway_counted_for_a_deleted_tenant_is_written(registry):
    with registry.writing() as session:
        tenants.create(session, "globex")
        counts = {
            usage.UsageItem("acme", "2026-01-01", "acme/support", "v1"): usage.UsageCount(1, 2, 3),
            usage.UsageItem("acme", "2026-01-01", "acme/sales", "v2"): usage.UsageCount(1, 2, 3),
            usage.UsageItem("", "2026-01-01", "base", ""): usage.UsageCount(1, 2, 3),
            usage.UsageItem("globex", "2026-01-01", "base", ""): usage.UsageCount(1, 2, 3),
        }
        windows = {"acme": RateWindow(1, requests=1), "globex": RateWindow(1, requests=1)}
        usage.record_batch(session, "gateway-1", 1, counts, windows, now=1.0)
    with registry.reading() as session:
        found = {(row.tenant, row.model): row.requests for row in usage.daily(session, None, "2026", "2027")}
    assert found == {(None, "base"): 1, ("globex", "base"): 1, ("(deleted)", "(deleted)"): 2}


def test_a_reference_to_something_deleted_is_a_conflict(registry):
    with registry.writing() as session:
        tenants.create(session, "acme")
        run = nightly.open_run(session).id
    with pytest.raises(Conflict, match="deleted in the meantime"), registry.writing() as session:
        nightly.record_step(session, run, NAME, "collect", StepStatus.DONE, {})


def test_a_rename_changes_every_reference(registry, make_spec):
    _, done = published(registry, make_spec, b"1")
    second, _ = published(registry, make_spec, b"2")
    to = AdapterName("acme", "help")
    with registry.writing() as session:
        adapters.pin(session, NAME, second, "keep")
        nightly.add_data(session, NAME, make_spec().train, None)
        queued = jobs.submit(session, make_spec(), {})
        running = jobs.submit(session, make_spec(), {})
        leased = jobs.lease(session, "w", now=time.time(), seconds=60, max_attempts=3, job_id=running.id)
        before, history = adapters.get(session, NAME), adapters.alias_history(session, NAME)
        versions, scores = adapters.list_versions(session, NAME), evaluations.list_evaluations(session, NAME)
    counted = rows(registry)
    with registry.writing() as session:
        renamed = renaming.rename(session, NAME, to)
    assert renamed == before.model_copy(update={"name": "acme/help"}) and renamed.pinned
    assert rows(registry) == counted
    with registry.writing() as session:
        assert adapters.alias_history(session, to) == history
        assert [
            row.model_copy(update={"adapter": str(NAME)}) for row in adapters.list_versions(session, to)
        ] == versions
        assert [
            row.model_copy(update={"adapter": str(NAME)}) for row in evaluations.list_evaluations(session, to)
        ] == scores
        assert {jobs.get(session, job).spec.adapter for job in (done, queued.id, running.id)} == {"acme/help"}
        assert [data.adapter for data in nightly.pending_data(session)] == ["acme/help"]
        with pytest.raises(NotFound):
            adapters.get(session, NAME)
        # A worker that leased its job under the old name publishes under the new one.
        record = VersionRecord(
            id="c" * 64, adapter=str(NAME), job=running.id, base="b" * 64, bytes=1, created_at=time.time()
        )
        checkpoints.add(session, running.id, leased.attempt, 1, record, {})
        jobs.publish(session, running.id, leased.attempt, record)
        assert adapters.get(session, to).challenger == record.id
        assert [each.name for each in adapters.list_adapters(session, "acme")] == ["acme/help"]


def test_a_conflicting_rename_is_refused(registry, make_spec):
    published(registry, make_spec, b"1")
    published(registry, make_spec, b"2", "acme/sales")
    for to, error, message in (
        ("acme/sales", Conflict, "already"),
        ("globex/support", Exception, "of another tenant"),
    ):
        with pytest.raises(error, match=message), registry.writing() as session:
            renaming.rename(session, NAME, AdapterName.parse(to))
    with registry.writing() as session:
        assert renaming.rename(session, NAME, NAME) == adapters.get(session, NAME)
        with pytest.raises(NotFound):
            renaming.rename(session, AdapterName("acme", "none"), AdapterName("acme", "x"))
        run = nightly.open_run(session).id
        nightly.record_step(session, run, NAME, "collect", StepStatus.DONE, {})
    with pytest.raises(Conflict, match=run), registry.writing() as session:
        renaming.rename(session, NAME, AdapterName("acme", "help"))


_KILLED = """
import os, sys
from loramill.registry import Registry, deletion
registry = Registry.open(sys.argv[1], sys.argv[2])
with registry.writing() as session:
    deletion.delete_tenant(session, "acme")
    print("deleted", flush=True)
    sys.stdin.read()  # killed before the commit
"""


def test_a_deletion_that_is_killed_has_changed_nothing(registry, make_spec, database_url, tmp_path):
    version, _ = published(registry, make_spec, b"1")
    before = rows(registry, without=())
    process = subprocess.Popen(
        [sys.executable, "-c", _KILLED, database_url, (tmp_path / "artifacts").as_uri()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert process.stdout.readline() == "deleted\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert rows(registry, without=()) == before
    with registry.writing() as session:
        deletion.delete_tenant(session, "acme")
    with registry.reading() as session:
        assert session.scalars(select(TenantRow)).all() == session.scalars(select(KeyRow)).all() == []
    assert registry.artifacts.read(version, "a") == b"1"  # until the clean-up
    assert registry.remove_unreferenced(older_than=-1) == 2
