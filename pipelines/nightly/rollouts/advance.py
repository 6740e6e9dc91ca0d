"""Decides about all open rollouts, and carries the decisions out. Any process may do it, again and again."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy.orm import Session

from loramill.names import SHORT_HASH_LENGTH
from loramill.pipelines.nightly.rollouts.policy import RolloutDecision, RolloutVerdict, decide
from loramill.registry import Registry, audit
from loramill.registry.rollouts import moves, records, traffic
from loramill.settings import Settings
from loramill.types import RolloutKind, RolloutOutcome, RolloutRecord

log = logging.getLogger(__name__)

#: Seconds between two decisions. A rollback follows the last of the requests that it needs by this much, and by the
#: gateways' two seconds.
INTERVAL_SECONDS = 5.0
#: What the audit records in place of an API key.
AUDIT_KEY = "rollout"


def advance(registry: Registry, now: float) -> list[RolloutRecord]:
    """Decides about each open rollout; returns those that ended.

    A decision is recorded in the transaction that moves the aliases. Two processes that decide at the same time move
    them once, and one that is killed in between leaves the rollout open for the next.
    """
    with registry.reading() as session:
        states = traffic.measured_all(session, records.list_open(session))
    ended = []
    for state in states:
        decision = decide(state, now=now)
        if decision.verdict is RolloutVerdict.CONTINUE:
            continue
        with registry.writing() as session:
            settled = _carry_out(session, state, decision, now)
        if settled is not None:
            log.info("%s of %s: %s, %s", settled.kind, settled.adapter, settled.outcome, settled.reason)
            ended.append(settled)
    _forget(registry, now)
    return ended


def advance_periodically(
    registry: Registry, stop: threading.Event, *, interval_seconds: float = INTERVAL_SECONDS
) -> None:
    """Decides about open rollouts until `stop` is set, also after errors."""
    while not stop.wait(interval_seconds):
        try:
            advance(registry, time.time())
        except Exception:  # the database may be back the next time
            log.exception("rollouts could not be decided; retrying")


@contextmanager
def deciding(registry: Registry) -> Iterator[None]:
    """Decides about open rollouts at once, and then until the block ends."""
    advance(registry, time.time())
    stop = threading.Event()
    thread = threading.Thread(target=advance_periodically, args=(registry, stop), name="rollouts", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def start_deciding(settings: Settings, stop: threading.Event) -> threading.Thread:
    """Starts a thread that decides about open rollouts until `stop` is set."""

    def decide_until_stopped() -> None:
        registry = Registry.open(settings.database, settings.artifacts)
        try:
            advance_periodically(registry, stop)
        finally:
            registry.close()

    thread = threading.Thread(target=decide_until_stopped, name="rollouts", daemon=True)
    thread.start()
    return thread


def _carry_out(session: Session, rollout: RolloutRecord, decision: RolloutDecision, now: float) -> RolloutRecord | None:
    outcome = RolloutOutcome.ROLLED_BACK
    if decision.verdict is RolloutVerdict.PROMOTE:
        outcome = RolloutOutcome.KEPT if rollout.kind is RolloutKind.WATCH else RolloutOutcome.PROMOTED
    settled = moves.settle(session, rollout, outcome, _reason(rollout, outcome, decision), now=now)
    if settled is not None:
        audit.record(
            session,
            tenant=settled.adapter.partition("/")[0],
            actor=None,
            key=AUDIT_KEY,
            action=f"adapter.{_ACTIONS[outcome]}",
            subject=settled.adapter,
            request=settled.run or f"rollout-{settled.id}",
            version=settled.version,
            rollout=settled.id,
            reason=settled.reason,
        )
    return settled


_ACTIONS = {
    RolloutOutcome.PROMOTED: "promote",
    RolloutOutcome.ROLLED_BACK: "rollback",
    RolloutOutcome.KEPT: "keep",
}


def _reason(rollout: RolloutRecord, outcome: RolloutOutcome, decision: RolloutDecision) -> str:
    return f"{rollout.kind} of {rollout.version[:SHORT_HASH_LENGTH]} {outcome}: {decision.reason}"


def _forget(registry: Registry, now: float) -> None:
    """Deletes traffic that no rollout needs, once it is old; the database is written only if there is some."""
    before = now - traffic.KEPT_SECONDS
    with registry.reading() as session:
        if not traffic.has_before(session, before):
            return
    with registry.writing(invalidate_caches=False) as session:
        traffic.forget(session, before)
