"""Challengers that wait for a person: each is decided once, and only against the champion it was compared with."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest

from loramill.errors import Conflict, NotFound
from loramill.names import AdapterName
from loramill.registry import Registry, adapters, nightly, nightly_approvals, renaming, tenants
from loramill.registry.rollouts import records
from loramill.types import (
    Alias,
    Approval,
    ApprovalState,
    RolloutKind,
    StepStatus,
    VersionRecord,
)

from .waiting_challengers import POLICY, ask

NAME = AdapterName("acme", "support")
FIRST, SECOND, THIRD = ("1" * 64, "2" * 64, "3" * 64)


@pytest.fixture(autouse=True)
def _versions(registry: Registry) -> None:
    with registry.writing() as session:
        tenants.create(session, "acme")
        adapters.get_or_create(session, NAME)
        for version in (FIRST, SECOND, THIRD):
            record = VersionRecord(id=version, adapter=str(NAME), job=None, base="b" * 64, bytes=7, created_at=1.0)
            adapters.add_version(session, record)
        adapters.move(session, NAME, Alias.CHALLENGER, SECOND, "test")


@pytest.fixture
def pending(registry: Registry) -> Approval:
    with registry.writing() as session:
        return ask(session, NAME, SECOND, FIRST)


def waiting(registry: Registry) -> list[Approval]:
    with registry.reading() as session:
        return nightly_approvals.list_waiting(session)


def champion(registry: Registry) -> str | None:
    with registry.reading() as session:
        return adapters.get(session, NAME).champion


def approve(registry: Registry, pending: Approval, by: str = "key-1", note: str = "") -> Approval:
    with registry.writing() as session:
        return nightly_approvals.approve(session, pending.run, NAME, by=by, note=note)


def test_an_approved_challenger_is_promoted_and_watched(registry: Registry, pending: Approval) -> None:
    assert waiting(registry) == [pending]
    decided = approve(registry, pending, note="looks good")
    assert (decided.state, decided.decided_by, decided.note) == (ApprovalState.APPROVED, "key-1", "looks good")
    assert waiting(registry) == []
    with registry.reading() as session:
        rollout = records.find_open(session, NAME)
        (step,) = nightly.list_steps(session, pending.run, stage=nightly_approvals.STAGE)
        (moved, *_) = adapters.alias_history(session, NAME)
    assert champion(registry) == SECOND and "it gains 0.100; approved by key-1" in moved.reason
    assert rollout is not None
    assert (rollout.kind, rollout.baseline, rollout.run) == (RolloutKind.WATCH, FIRST, pending.run)
    assert rollout.policy == POLICY
    assert (step.result["promoted"], step.result["champion"], step.status) == (True, SECOND, StepStatus.DONE)
    with pytest.raises(Conflict, match="222222222222 of acme/support was approved by key-1"):
        approve(registry, pending, "key-2")


@pytest.mark.parametrize(("shadow", "kind"), [(False, RolloutKind.CANARY), (True, RolloutKind.SHADOW)])
def test_an_approved_challenger_is_tried_first_if_defined(registry: Registry, shadow: bool, kind: RolloutKind) -> None:
    with registry.writing() as session:
        pending = ask(session, NAME, SECOND, FIRST, share=0.2, shadow=shadow)
    approve(registry, pending)
    with registry.reading() as session:
        rollout = records.find_open(session, NAME)
        (step,) = nightly.list_steps(session, pending.run, stage=nightly_approvals.STAGE)
    assert rollout is not None and (rollout.kind, rollout.share, rollout.version) == (kind, 0.2, SECOND)
    assert rollout.ends_at == rollout.started_at + 600
    assert champion(registry) == FIRST and step.result["rollout"] == kind and not step.result["promoted"]


def test_a_rejected_challenger_is_dropped_and_kept_as_a_version(registry: Registry, pending: Approval) -> None:
    with registry.writing() as session:
        decided = nightly_approvals.reject(session, pending.run, NAME, by="key-1", note="too curt")
        assert (decided.state, decided.note) == (ApprovalState.REJECTED, "too curt")
        assert adapters.get(session, NAME).challenger is None
        assert adapters.get_owned_version(session, NAME, SECOND).id == SECOND
    assert waiting(registry) == [] and champion(registry) == FIRST
    with pytest.raises(Conflict, match="was rejected by key-1"):
        approve(registry, pending)


def test_a_rejection_leaves_another_challenger_alone(registry: Registry, pending: Approval) -> None:
    with registry.writing() as session:
        adapters.move(session, NAME, Alias.CHALLENGER, THIRD, "trained by hand")
        nightly_approvals.reject(session, pending.run, NAME, by="key-1")
        assert adapters.get(session, NAME).challenger == THIRD


def test_a_challenger_is_not_approved_against_another_champion(registry: Registry, pending: Approval) -> None:
    with registry.writing() as session:
        adapters.promote(session, NAME, THIRD, "by hand")
    with pytest.raises(Conflict, match=r"champion of acme/support is now 333333333333.*with 111111111111.*--reject"):
        approve(registry, pending)
    assert waiting(registry) == [pending] and champion(registry) == THIRD
    with registry.writing() as session:
        adapters.promote(session, NAME, FIRST, "by hand")
    approve(registry, pending)
    assert champion(registry) == SECOND


def test_a_challenger_that_was_promoted_by_hand_can_be_approved(registry: Registry, pending: Approval) -> None:
    with registry.writing() as session:
        adapters.promote(session, NAME, SECOND, "by hand")
    assert approve(registry, pending).state is ApprovalState.APPROVED
    assert champion(registry) == SECOND and waiting(registry) == []


def test_a_pinned_champion_stays_and_the_question_too(registry: Registry, pending: Approval) -> None:
    with registry.writing() as session:
        adapters.pin(session, NAME, FIRST, "stay")
    with pytest.raises(Conflict, match="unpin"):
        approve(registry, pending)
    assert waiting(registry) == [pending]


def test_the_challenger_of_a_later_run_takes_the_place_of_an_older_one(registry: Registry, pending: Approval) -> None:
    with registry.writing() as session:
        later = ask(session, NAME, THIRD, FIRST)
    assert waiting(registry) == [later] and later.run != pending.run
    with pytest.raises(Conflict, match=f"does not wait any more: the challenger of {later.run} passed"):
        approve(registry, pending)
    approve(registry, later)
    assert champion(registry) == THIRD


def test_what_did_not_ask_is_not_found(registry: Registry, pending: Approval) -> None:
    for run, name in (("nightly-0", NAME), (pending.run, "acme/other")):
        with registry.writing() as session, pytest.raises(NotFound):
            nightly_approvals.approve(session, run, name, by="key-1")


def test_questions_are_listed_by_tenant_and_run_and_follow_a_rename(registry: Registry, pending: Approval) -> None:
    with registry.writing() as session:
        to = AdapterName("acme", "help")
        renaming.rename(session, NAME, to)
        moved = pending.model_copy(update={"adapter": str(to)})
        assert nightly_approvals.list_waiting(session, tenant="acme", run=pending.run) == [moved]
        assert nightly_approvals.list_waiting(session, tenant="acm") == []
        assert nightly_approvals.list_waiting(session, run="nightly-0") == []
        nightly_approvals.approve(session, pending.run, to, by="key-1")


def test_of_many_who_approve_at_once_one_succeeds(registry: Registry, pending: Approval) -> None:
    together = Barrier(6)

    def decide(number: int) -> str:
        together.wait()
        try:
            return str(approve(registry, pending, f"key-{number}").decided_by)
        except Conflict as error:
            return error.message

    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(decide, range(6)))
    (first,) = [each for each in answers if each.startswith("key-")]
    assert all(f"was approved by {first}." in each for each in answers if each != first)
    with registry.reading() as session:
        moves = [each for each in adapters.alias_history(session, NAME) if each.alias is Alias.CHAMPION]
        rollouts = records.list_rollouts(session, name=NAME)
    assert [each.version for each in moves] == [SECOND, FIRST] and len(rollouts) == 1


def test_a_kill_between_the_move_and_the_answer_changes_nothing(
    registry: Registry, pending: Approval, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(nightly_approvals, "_record", killed)
        with pytest.raises(KeyboardInterrupt):
            approve(registry, pending)
    assert champion(registry) == FIRST and waiting(registry) == [pending]
    approve(registry, pending)
    assert champion(registry) == SECOND
