"""What pruning removes and what it keeps, on both databases; kills, and changes at the same time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence

import pytest
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from loramill.errors import NotFound, VersionPruned
from loramill.names import AdapterName
from loramill.registry import Registry, adapters, audit, deletion, evaluations, jobs, nightly, renaming, usage
from loramill.registry.database.tables import AliasRow, PrunedVersionRow, VersionRow
from loramill.registry.jobs import checkpoints
from loramill.registry.retention import prune as pruning
from loramill.registry.retention.prune import plan, prune
from loramill.types import Alias, JobSpec, Removal, RetentionPolicy, StepStatus, VersionRecord

NAME, DAY = AdapterName("acme", "support"), 86400.0
NEWEST = RetentionPolicy(keep_versions=1)
MakeSpec = Callable[..., JobSpec]


def published(registry: Registry, make_spec: MakeSpec, content: bytes, adapter: str = "acme/support") -> str:
    """A version with a job, which is a challenger until the next one is published."""
    spec = make_spec(adapter)
    version = registry.artifacts.put({"a": content})
    with registry.writing() as session:
        adapters.get_or_create(session, spec.adapter_name)
        job = jobs.submit(session, spec, {})
        leased = jobs.lease(session, "w", now=time.time(), seconds=60, max_attempts=3, job_id=job.id)
        assert leased is not None
        record = VersionRecord(id=version, adapter=adapter, job=job.id, base=spec.base, bytes=7, created_at=time.time())
        jobs.publish(session, job.id, leased.attempt, record)
    return version


@pytest.fixture
def versions(registry: Registry, make_spec: MakeSpec) -> list[str]:
    """Four versions: the champion, two that nothing refers to, the challenger."""
    return [published(registry, make_spec, content) for content in (b"1", b"2", b"3", b"4")]


def stored(registry: Registry, name: AdapterName | str = NAME) -> set[str]:
    with registry.reading() as session:
        return {version.id for version in adapters.list_versions(session, name)}


def run(registry: Registry, policy: RetentionPolicy = NEWEST, **options: object) -> list[str]:
    return [each.version for each in prune(registry, policy, now=time.time(), **options)]  # type: ignore[arg-type]


def test_only_what_nothing_refers_to_is_removed(registry: Registry, versions: list[str]) -> None:
    with registry.reading() as session:
        planned = plan(session, NEWEST, now=time.time())
    assert stored(registry) == set(versions)
    assert [(each.version, each.kind, each.bytes) for each in planned] == [
        (versions[2], "version", 7),
        (versions[1], "version", 7),
    ]
    assert {each.reason for each in planned} == {"not its adapter's newest version"}
    assert run(registry) == [versions[2], versions[1]]
    assert stored(registry) == {versions[0], versions[3]}
    assert run(registry) == []
    with registry.reading() as session:
        record = adapters.get(session, NAME)
        assert (record.champion, record.challenger) == (versions[0], versions[3])
        assert len(adapters.alias_history(session, NAME)) == 4


def test_without_a_retention_nothing_is_removed(registry: Registry, versions: list[str]) -> None:
    assert run(registry, RetentionPolicy()) == []
    assert stored(registry) == set(versions)


def test_a_pruned_version_is_answered_with_the_reason(registry: Registry, versions: list[str]) -> None:
    run(registry)
    with registry.reading() as session:
        with pytest.raises(
            VersionPruned, match=r"retention removed it on 20.*newest version\. Use an alias.*retention"
        ):
            adapters.resolve(session, NAME, versions[1][:8])
        with pytest.raises(NotFound) as unknown:
            adapters.resolve(session, NAME, "0" * 8)
        assert not isinstance(unknown.value, VersionPruned)


def test_a_version_that_is_published_again_is_found(
    registry: Registry, make_spec: MakeSpec, versions: list[str]
) -> None:
    run(registry)
    assert published(registry, make_spec, b"2") == versions[1]
    with registry.reading() as session:
        assert adapters.resolve(session, NAME, versions[1]).id == versions[1]
    published(registry, make_spec, b"5")
    assert versions[1] in run(registry)  # and removed again
    with registry.reading() as session, pytest.raises(VersionPruned):
        adapters.resolve(session, NAME, versions[1])


def _evaluate(session: Session, version: str, make_spec: MakeSpec) -> None:
    evaluations.add(session, NAME, version, "file-x", "new", 3, {"exact_match": 1.0})


def _start(session: Session, version: str, make_spec: MakeSpec) -> None:
    jobs.submit(session, make_spec(start_from=version), {})


def _start_another(session: Session, version: str, make_spec: MakeSpec) -> None:
    jobs.submit(session, make_spec("acme/sales", start_from=version), {})


def _request(session: Session, version: str, make_spec: MakeSpec) -> None:
    day = time.strftime("%Y-%m-%d", time.gmtime())
    usage.add(session, {usage.UsageItem("acme", day, "acme/support", version): usage.UsageCount(1, 1, 1)})


def _previous(session: Session, version: str, make_spec: MakeSpec) -> None:
    adapters.move(session, NAME, Alias.PREVIOUS, version, "test")


def _promote(session: Session, version: str, make_spec: MakeSpec) -> None:
    adapters.promote(session, NAME, version, "test")


REFERENCES = [_evaluate, _start, _start_another, _request, _previous, _promote]


@pytest.mark.parametrize("refer", REFERENCES)
def test_a_reference_between_plan_and_removal_keeps_the_version(
    registry: Registry,
    make_spec: MakeSpec,
    versions: list[str],
    refer: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    planned = pruning.plan

    def plan_then_refer(session: Session, *arguments: object, **options: object) -> object:
        found = planned(session, *arguments, **options)  # type: ignore[arg-type]
        monkeypatch.setattr(pruning, "plan", planned)
        with registry.writing() as other:
            refer(other, versions[1], make_spec)
        return found

    monkeypatch.setattr(pruning, "plan", plan_then_refer)
    assert run(registry) == [versions[2]]
    assert versions[1] in stored(registry)


@pytest.mark.parametrize("refer", [_evaluate, _start, _previous, _promote])
def test_pruning_waits_for_a_transaction_that_refers_to_a_version(
    registry: Registry, make_spec: MakeSpec, versions: list[str], refer: Callable[..., None]
) -> None:
    removed: list[str] = []
    pruner = threading.Thread(target=lambda: removed.extend(run(registry)))
    with registry.writing() as session:
        refer(session, versions[1], make_spec)
        session.flush()
        pruner.start()
        pruner.join(0.3)
        assert pruner.is_alive()
    pruner.join(20)
    assert removed == [versions[2]]
    assert versions[1] in stored(registry)


def test_pruning_with_an_audit_and_submissions_do_not_wait_for_each_other(
    registry: Registry, make_spec: MakeSpec, versions: list[str]
) -> None:
    spec, refused = make_spec(start_from=versions[1]), list[NotFound]()

    def submit() -> None:
        try:
            with registry.writing() as session:
                jobs.submit(session, spec, {})
        except NotFound as error:
            refused.append(error)

    def record(session: Session, name: str, removed: Sequence[Removal]) -> None:
        submitter.start()
        submitter.join(0.5)  # on PostgreSQL, it has locked what it can by then
        audit.record(session, tenant="acme", actor=None, key="k", action="prune", subject=name, request="r")

    submitter = threading.Thread(target=submit)
    assert run(registry, on_pruned=record) == [versions[2], versions[1]]
    submitter.join(20)
    assert "no version" in refused[0].message


def test_a_running_nightly_run_keeps_all_versions_of_its_adapters(
    registry: Registry, make_spec: MakeSpec, versions: list[str]
) -> None:
    others = [published(registry, make_spec, content, "acme/sales") for content in (b"5", b"6", b"7")]
    with registry.writing() as session:
        begun = nightly.open_run(session)
        nightly.record_step(session, begun.id, NAME, "collect", StepStatus.DONE, {})
    assert run(registry) == [others[1]]
    with registry.writing() as session:
        nightly.finish_run(session, begun.id)
    assert run(registry) == [versions[2], versions[1]]


def test_an_adapters_own_retention_replaces_the_settings(
    registry: Registry, make_spec: MakeSpec, versions: list[str]
) -> None:
    others = [published(registry, make_spec, content, "globex/bot") for content in (b"5", b"6", b"7")]
    with registry.writing() as session:
        adapters.set_retention(session, NAME, RetentionPolicy())
        adapters.set_retention(session, "globex/bot", RetentionPolicy(version_days=3))
    assert run(registry) == []
    later = [each.version for each in prune(registry, NEWEST, now=time.time() + 4 * DAY)]
    assert later == [others[1]]
    with registry.writing() as session:
        adapters.set_retention(session, NAME, None)
    assert run(registry, tenant="globex") == []
    assert run(registry) == [versions[2], versions[1]]


def test_checkpoints_are_pruned_and_keep_their_metrics(registry: Registry, make_spec: MakeSpec) -> None:
    spec, kept = make_spec(), []
    with registry.writing() as session:
        job = jobs.submit(session, spec, {})
        leased = jobs.lease(session, "w", now=time.time(), seconds=60, max_attempts=3, job_id=job.id)
        assert leased is not None
        for step in (1, 2, 3):
            kept.append(registry.artifacts.put({"a": b"%d" % step}))
            record = VersionRecord(
                id=kept[-1], adapter=spec.adapter, job=job.id, base=spec.base, bytes=7, created_at=time.time()
            )
            checkpoints.add(session, job.id, leased.attempt, step, record, {"valid_loss": 1.0 / step})
        jobs.publish(session, job.id, leased.attempt, record)  # the result is the last checkpoint
    policy = RetentionPolicy(keep_checkpoints=1)
    with registry.reading() as session:
        planned = plan(session, policy, now=time.time())
    assert [(each.version, each.kind, each.job) for each in planned] == [(kept[0], "checkpoint", job.id)]
    assert run(registry, RetentionPolicy(checkpoint_days=1)) == []
    assert run(registry, policy) == [kept[0]]
    with registry.reading() as session:
        found = checkpoints.list_checkpoints(session, job.id)
        assert [(each.step, each.version, each.metrics["valid_loss"]) for each in found] == [
            (3, kept[2], 1 / 3),
            (2, kept[1], 0.5),
            (1, None, 1.0),
        ]
        assert jobs.get(session, job.id).version == kept[2]


def test_files_of_a_pruned_version_stay_for_an_hour(registry: Registry, versions: list[str]) -> None:
    run(registry)
    assert registry.remove_unreferenced(older_than=-1) == 0
    assert registry.artifacts.read(versions[1], "a") == b"2"  # for a request that was admitted before


def test_a_rename_and_a_deletion_take_the_pruned_names_with_them(registry: Registry, versions: list[str]) -> None:
    run(registry)
    to = AdapterName("acme", "help")
    with registry.writing() as session:
        adapters.set_retention(session, NAME, NEWEST)
        assert renaming.rename(session, NAME, to).retention == NEWEST
        with pytest.raises(VersionPruned):
            adapters.resolve(session, to, versions[1])
        deletion.delete_adapter(session, to)
        assert session.scalars(select(PrunedVersionRow)).all() == []


_KILLED = """
import os, signal, sys, time
from loramill.registry import Registry
from loramill.registry.retention.prune import prune
from loramill.types import RetentionPolicy
registry = Registry.open(*sys.argv[1:3])
kill = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
prune(registry, RetentionPolicy(keep_versions=1), now=time.time(), on_pruned=kill)
"""


def test_a_kill_leaves_no_version_without_files(registry: Registry, versions: list[str], database_url: str) -> None:
    command = [sys.executable, "-c", _KILLED, database_url, registry.artifacts.url]
    killed = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert stored(registry) == set(versions)
    assert registry.remove_unreferenced(older_than=-1) == 0
    run(registry)  # a kill after this leaves files without a version
    with registry.writing() as session:
        session.execute(update(PrunedVersionRow).values(pruned_at=time.time() - 3601))
    assert registry.remove_unreferenced(older_than=-1) == 2
    for version in stored(registry):
        assert registry.artifacts.fetch(version)


def test_aliases_move_while_everything_else_is_pruned(
    registry: Registry, make_spec: MakeSpec, versions: list[str]
) -> None:
    stop, errors = threading.Event(), list[BaseException]()

    def keep_pruning() -> None:
        while not stop.is_set():
            try:
                run(registry, RetentionPolicy(version_days=1e-9))
            except BaseException as error:  # noqa: BLE001
                errors.append(error)

    pruner = threading.Thread(target=keep_pruning)
    pruner.start()
    try:
        for content in range(6):
            published(registry, make_spec, b"new %d" % content)
            with registry.writing() as session:
                challenger = adapters.get(session, NAME).challenger
                assert challenger is not None
                adapters.promote(session, NAME, challenger, "test")
            with registry.writing() as session:
                adapters.rollback(session, NAME, "test")
    finally:
        stop.set()
        pruner.join(30)
    assert errors == []
    with registry.reading() as session:
        pointed = set(session.scalars(select(AliasRow.version)))
        assert pointed <= set(session.scalars(select(VersionRow.id)))
        record = adapters.get(session, NAME)
    run(registry, RetentionPolicy(version_days=1e-9))
    assert stored(registry) == {record.champion, record.previous}
