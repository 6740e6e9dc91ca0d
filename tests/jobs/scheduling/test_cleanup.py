"""Clean-up removes what nothing refers to, and keeps everything else."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from loramill.errors import TrainingDiverged
from loramill.jobs.scheduling.cleanup import (
    ARTIFACT_GRACE_SECONDS,
    ENDED_JOB_RETENTION_SECONDS,
    FAILED_JOB_RETENTION_SECONDS,
    clean_up,
    remove_ended_checkpoints,
)
from loramill.names import AdapterName
from loramill.registry import Registry, adapters, datasets, deletion, jobs, tenants
from loramill.registry.feedback import completions
from loramill.types import (
    CompletionKind,
    CompletionRecord,
    CompletionStorage,
    JobSpec,
    RetentionPolicy,
    VersionRecord,
)

from ...databases import create_sqlite_database

OFF, DAY = RetentionPolicy(), 86400.0


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    database = f"sqlite:///{tmp_path / 'loramill.db'}"
    create_sqlite_database(database)
    opened = Registry.open(database, (tmp_path / "artifacts").as_uri())
    with opened.writing() as session:
        tenants.create(session, "acme")
    return opened


def submitted(registry: Registry, checkpoints: Path) -> str:
    """Submits a job and writes a checkpoint for it."""
    artifact = registry.artifacts.put({"data.jsonl": b"{}\n"})
    with registry.writing() as session:
        data = datasets.create(session, "acme", "rows.jsonl", artifact, 3, 1).id
        spec = JobSpec(base="0" * 64, adapter="acme/loud", train=data, steps=1, batch_size=1)
        job = jobs.submit(session, spec, {}).id
    (checkpoints / job).mkdir(parents=True)
    (checkpoints / job / "whole.safetensors").write_bytes(b"weights")
    return job


def fail(registry: Registry, job: str) -> None:
    with registry.writing() as session:
        leased = jobs.lease(session, "w", now=time.time(), seconds=60, max_attempts=5, job_id=job)
        assert leased is not None
        jobs.fail(session, job, leased.attempt, TrainingDiverged("NaN"), retry=False)


def test_ended_jobs_lose_their_checkpoints_failed_ones_after_a_week(registry: Registry, tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    waiting, cancelled, failed = (submitted(registry, checkpoints) for _ in range(3))
    with registry.writing() as session:
        jobs.cancel(session, cancelled)
    fail(registry, failed)
    (checkpoints / "not-a-job").mkdir()

    def left() -> set[str]:
        return {folder.name for folder in checkpoints.iterdir()}

    now = time.time()
    assert remove_ended_checkpoints(registry, checkpoints, OFF, now=now) == 0  # its worker may be about to
    assert remove_ended_checkpoints(registry, checkpoints.as_uri(), OFF, now=now + ENDED_JOB_RETENTION_SECONDS + 1) == 1
    assert left() == {waiting, failed, "not-a-job"}
    assert remove_ended_checkpoints(registry, checkpoints, RetentionPolicy(checkpoint_days=9), now=now + 8 * DAY) == 0
    assert remove_ended_checkpoints(registry, checkpoints, OFF, now=now + FAILED_JOB_RETENTION_SECONDS + 1) == 1
    assert left() == {waiting, "not-a-job"}


def test_the_retention_of_an_adapter_decides_about_its_failed_jobs(registry: Registry, tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    fail(registry, submitted(registry, checkpoints))
    with registry.writing() as session:
        adapters.get_or_create(session, AdapterName("acme", "loud"))
        adapters.set_retention(session, "acme/loud", RetentionPolicy(checkpoint_days=1))
    for_all = RetentionPolicy(checkpoint_days=5)
    assert remove_ended_checkpoints(registry, checkpoints, for_all, now=time.time() + 0.9 * DAY) == 0
    assert remove_ended_checkpoints(registry, checkpoints, for_all, now=time.time() + 1.1 * DAY) == 1


def test_checkpoints_of_deleted_jobs_are_removed_at_once(registry: Registry, tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    failed, _ = submitted(registry, checkpoints), submitted(registry, checkpoints)
    fail(registry, failed)
    (checkpoints / "loramill-sessions").mkdir()
    assert remove_ended_checkpoints(registry, checkpoints, OFF, now=time.time()) == 0
    with registry.writing() as session:
        deletion.delete_tenant(session, "acme", cancel_jobs=True)
    assert remove_ended_checkpoints(registry, checkpoints.as_uri(), OFF, now=time.time()) == 2
    assert {folder.name for folder in checkpoints.iterdir()} == {"loramill-sessions"}


def test_unrecorded_artifacts_are_removed(registry: Registry, tmp_path: Path) -> None:
    submitted(registry, tmp_path / "checkpoints")
    forgotten = registry.artifacts.put({"data.jsonl": b"gone\n"})
    yesterday = time.time() - ARTIFACT_GRACE_SECONDS - 60
    for folder in (tmp_path / "artifacts").glob("[0-9a-f][0-9a-f]/*"):
        os.utime(folder, (yesterday, yesterday))
    assert clean_up(registry, tmp_path / "nowhere", OFF, now=time.time()) == 1
    assert not (tmp_path / "artifacts" / forgotten[:2] / forgotten).exists()
    with registry.reading() as session:
        (kept,) = datasets.list_datasets(session, "acme", None, 10)
    assert registry.artifacts.read(kept.artifact, "data.jsonl") == b"{}\n"


def test_old_versions_are_removed_and_their_files_an_hour_later(registry: Registry, tmp_path: Path) -> None:
    name, versions = AdapterName("acme", "loud"), [registry.artifacts.put({"a": b"%d" % each}) for each in range(3)]
    with registry.writing() as session:
        adapters.get_or_create(session, name)
        for version in versions:  # the champion, one that nothing refers to, the challenger
            record = VersionRecord(
                id=version, adapter=str(name), job=None, base="0" * 64, bytes=1, created_at=time.time()
            )
            adapters.add_version(session, record)
    days_ago = time.time() - 2 * ARTIFACT_GRACE_SECONDS
    for folder in (tmp_path / "artifacts").glob("[0-9a-f][0-9a-f]/*"):
        os.utime(folder, (days_ago, days_ago))
    assert clean_up(registry, tmp_path / "nowhere", OFF, now=time.time()) == 0
    keep_one = RetentionPolicy(keep_versions=1)
    assert clean_up(registry, tmp_path / "nowhere", keep_one, now=time.time() - 3600) == 2  # as if an hour had passed
    with registry.reading() as session:
        assert {each.id for each in adapters.list_versions(session, name)} == {versions[0], versions[2]}
    assert not (tmp_path / "artifacts" / versions[1][:2] / versions[1]).exists()
    assert registry.artifacts.fetch(versions[0]) and registry.artifacts.fetch(versions[2])


def test_stored_completions_are_removed_after_their_days(registry: Registry, tmp_path: Path) -> None:
    fields = {
        "kind": CompletionKind.TEXT,
        "tenant": "acme",
        "adapter": None,
        "version": None,
        "model": "tiny",
        "request": {},
        "response": {},
    }
    with registry.writing() as session:
        tenants.set_storage(session, "acme", CompletionStorage(store_completions=True))
        old_and_new = [CompletionRecord(id=f"cmpl-{at:g}", created_at=at * DAY, **fields) for at in (1.0, 29.0)]
        assert completions.add_many(session, old_and_new) == 2
    assert clean_up(registry, tmp_path / "none", OFF, now=31.5 * DAY) == 1
    assert clean_up(registry, tmp_path / "none", OFF, now=31.5 * DAY, completion_days=2) == 1
