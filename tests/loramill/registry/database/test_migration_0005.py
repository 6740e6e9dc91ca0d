"""Migration 0005: an older database keeps all of its content, under the new names."""

import json

import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy import MetaData, inspect

from loramill.names import AdapterName
from loramill.registry import Registry, adapters, api_keys, datasets, jobs, migrate, nightly, tenants, usage
from loramill.registry.database.engine import for_writing, make_engine, parse_url
from loramill.registry.jobs import queue, transitions, worker_slots
from loramill.types import AdapterRecord, JobStatus, RateWindow, StepStatus

BASE, VERSION, OTHER = "b" * 64, "c" * 64, "d" * 64
NAME = AdapterName("acme", "support")
SPEC = {
    "base": BASE,
    "adapter": "acme/support",
    "train": "file-1",
    "valid": None,
    "loraplus_lr_ratio": 1.0,
    "learn": "last",
    "learning_rate": 0.001,
    "steps": 5,
    "batch_size": 2,
}
RENAMED = {"train_on" if key == "learn" else key: value for key, value in SPEC.items()}


def job(number: int, **fields: object) -> dict[str, object]:
    values = {"status": "queued", "attempt": 0, "returned": 0, "priority": 0, "executor": "session", "cost": 10.0}
    values |= {"step": 0, "trained_tokens": 0, "metadata": {"team": "a"}, "created_at": float(number)}
    return {"id": f"ftjob-{number}", "tenant": "acme", "spec": SPEC, "base": BASE, **values, **fields}


RUNNING = {"status": "running", "attempt": 1, "owner": "w", "lease_until": 50.0, "max_attempts": 5}
ROWS: dict[str, list[dict[str, object]]] = {
    "tenants": [{"id": 1, "name": "acme", "created_at": 1.0, "weight": 2.0, "max_running": 9, "served": 7.5}],
    "api_keys": [
        {
            "id": "key-1",
            "tenant": "acme",
            "digest": api_keys.hash_secret("lm-secret"),
            "hint": "cret",
            "created_at": 1.0,
            "scopes": "inference read",
        }
    ],
    "datasets": [
        {"id": "file-1", "tenant": "acme", "filename": "a.jsonl", "artifact": "e" * 64, "bytes": 9, "examples": 3}
        | {"created_at": 1.0}
    ],
    "adapters": [{"name": "acme/support", "tenant": "acme", "created_at": 1.0, "pinned": True}],
    "jobs": [
        job(
            1,
            status="succeeded",
            version=VERSION,
            spec={name: value for name, value in SPEC.items() if name != "learn"},
        ),
        job(2, **RUNNING, **{"asked": "cancel"}, step=3, loss=1.5),
        job(3, **RUNNING, lost_step=4, furthest=8, step=4),
        job(4),
        job(5, priority=3),
        job(6, status="paused"),
    ],
    "job_events": [
        {
            "job": "ftjob-2",
            "created_at": 2.0,
            "level": "info",
            "kind": "metrics",
            "message": "Step 1",
            "data": {"step": 1},
        }
    ],
    "job_checkpoints": [
        {"id": "ftckpt-1", "job": "ftjob-2", "step": 1, "metrics": {"valid_loss": 2.0}, "created_at": 2.0}
    ],
    "versions": [
        {"adapter": "acme/support", "id": version, "job": source, "base": BASE, "bytes": 5, "created_at": at}
        for version, source, at in ((VERSION, "ftjob-1", 2.0), (OTHER, None, 3.0))
    ],
    "aliases": [
        {"adapter": "acme/support", "alias": "champion", "version": VERSION},
        {"adapter": "acme/support", "alias": "challenger", "version": OTHER},
    ],
    "alias_changes": [
        {"adapter": "acme/support", "alias": "champion", "version": VERSION, "reason": "published", "created_at": 2.0}
    ],
    "nightly_runs": [{"id": "night-1", "open": True, "created_at": 4.0}],
    "nightly_steps": [
        {
            "run": "night-1",
            "adapter": "acme/support",
            "step": step,
            "status": status,
            "result": result,
            "created_at": 4.0,
        }
        for step, status, result in (
            ("collect", "done", {"spec": SPEC, "champion": VERSION, "slices": []}),
            ("train", "pending", {"job": "ftjob-4"}),
        )
    ],
    "adapter_data": [{"adapter": "acme/support", "train": "file-1", "created_at": 4.0, "run": "night-1"}],
    "places": [{"name": "slot-1", "holder": "h", "until": 90.0, "size": 2, "ending": True}],
    "gateways": [{"id": "g", "at": 1190.0, "page": 4}],
    "meters": [
        {"gateway": "g", "tenant": "acme", "minute": 20, "requests": 3, "requests_before": 2, "tokens": 50}
        | {"tokens_before": 40, "running": 1, "reserved": 9}
    ],
}


def migrate_to(url: str, revision: str) -> None:
    engine = make_engine(parse_url(url))
    with for_writing(engine).begin() as connection:
        config = Config()
        config.set_main_option("script_location", "loramill.registry.database:migrations")
        config.attributes["connection"] = connection
        command.upgrade(config, revision)
    engine.dispose()


def fill(url: str) -> None:
    engine = make_engine(parse_url(url))
    tables = MetaData()
    with for_writing(engine).begin() as connection:
        tables.reflect(connection)
        for name, rows in ROWS.items():
            for row in rows:
                connection.execute(tables.tables[name].insert(), row)
    engine.dispose()


@pytest.fixture
def migrated(empty_url, tmp_path):
    """A registry on a database that was made and filled at revision 0004."""
    if empty_url.startswith("sqlite"):
        (tmp_path / "home").mkdir()
    migrate_to(empty_url, "0004")
    fill(empty_url)
    migrate(empty_url)
    registry = Registry.open(empty_url, "memory://test")
    yield registry
    registry.close()


def test_tenants_keys_files_versions_and_aliases_are_as_they_were(migrated):
    with migrated.reading() as session:
        tenant = tenants.get(session, "acme")
        assert (tenant.weight, tenant.max_running) == (2.0, 9)
        key = api_keys.authenticate(session, "lm-secret")
        assert (key.id, [scope.value for scope in key.scopes]) == ("key-1", ["inference", "read"])
        assert datasets.get(session, "file-1").artifact == "e" * 64
        assert adapters.get(session, NAME) == AdapterRecord(
            name="acme/support", tenant="acme", created_at=1.0, champion=VERSION, challenger=OTHER, pinned=True
        )
        assert [(version.id, version.job) for version in adapters.list_versions(session, NAME)] == [
            (OTHER, None),
            (VERSION, "ftjob-1"),
        ]
        assert [change.reason for change in adapters.alias_history(session, NAME)] == ["published"]


def test_jobs_keep_their_specs_statuses_and_pending_actions(migrated):
    with migrated.writing() as session:
        found = {job.id: job for job in jobs.list_jobs(session, tenant="acme", limit=9)}
        assert {id_: job.status.value for id_, job in found.items()} == {
            row["id"]: row["status"] for row in ROWS["jobs"]
        }
        cancelled = found["ftjob-2"]
        assert (cancelled.pending_action, cancelled.step, cancelled.loss, cancelled.attempt) == ("cancel", 3, 1.5, 1)
        assert found["ftjob-4"].spec.train_on == "last"
        assert found["ftjob-4"].metadata == {"team": "a"}
        assert [event.data for event in jobs.list_events(session, "ftjob-2")] == [{"step": 1}]
        row = transitions.lock_job(session, "ftjob-3")
        assert (row.lost_step, row.max_lost_step) == (4, 8)
        # Nothing but the renamed key differs, not even the order.
        assert json.dumps(transitions.lock_job(session, "ftjob-4").spec) == json.dumps(RENAMED)


def test_the_queue_keeps_its_order(migrated):
    with migrated.writing() as session:
        assert [each.id for each in queue.startable_jobs(session, 10.0, executor=None, limit=9)] == [
            "ftjob-5",
            "ftjob-4",
        ]
        progress = jobs.JobProgress(4, 40)
        assert jobs.heartbeat(session, "ftjob-2", 1, progress, now=10.0, seconds=15) == "cancel"
        assert jobs.release(session, "ftjob-2", 1).status is JobStatus.CANCELLED
        assert jobs.lease(session, "w", now=10.0, seconds=15, max_attempts=5).id == "ftjob-5"
        assert jobs.resume(session, "ftjob-6").status is JobStatus.QUEUED


def test_an_open_nightly_run_resumes_with_its_spec(migrated):
    with migrated.writing() as session:
        assert nightly.open_run(session).id == "night-1"
        steps = {step.step: step for step in nightly.list_steps(session, "night-1")}
        assert (steps["collect"].status, steps["collect"].result["spec"]) == (StepStatus.DONE, RENAMED)
        assert steps["train"].result == {"job": "ftjob-4"}
        assert nightly.collect(session, "night-1", NAME).train == ("file-1",)


def test_slots_and_rate_windows_are_still_held(migrated):
    with migrated.writing() as session:
        assert [slot.model_dump() for slot in worker_slots.list_held(session, 80.0)] == [
            {"name": "slot-1", "holder": "h", "size": 2, "ending": True}
        ]
        window = RateWindow(20, 3, 2, 50, 40, 1, 9)
        assert usage.peer_windows(session, "other", minute=20, now=1191.0) == {"acme": [window]}
        item = usage.UsageItem("acme", "2026-01-01", "base", "")
        for batch in (4, 5):  # batch 4 was recorded before the migration
            usage.record_batch(session, "g", batch, {item: usage.UsageCount(1)}, {}, now=1192.0)
        assert [row.requests for row in usage.daily(session, "acme", "2026-01-01", "2026-01-01")] == [1]


def test_the_old_tables_are_gone(migrated):
    with migrated.reading() as session:
        assert not {"places", "meters"} & set(inspect(session.connection()).get_table_names())
