"""A challenger that waits for a person, as a nightly run leaves it."""

from __future__ import annotations

from typing import Any

from sqlalchemy.orm import Session

from loramill.names import AdapterName
from loramill.registry import adapters, nightly, nightly_approvals
from loramill.types import Approval, Introduction, StepStatus, WatchPolicy

POLICY = WatchPolicy(window_seconds=600, min_requests=7)


def ask(session: Session, name: AdapterName | str, version: str, champion: str, **how: Any) -> Approval:
    """Records a nightly run whose challenger `version` waits; `how` are fields of its introduction."""
    run = nightly.open_run(session).id
    pending = Approval(
        run=run,
        adapter=str(name),
        version=version,
        champion=champion,
        reason="it gains 0.100",
        introduction=Introduction(**({"policy": POLICY} | how)),
        requested_at=1.0,
    )
    adapters.lock(session, name)
    nightly_approvals.supersede(session, name, run)
    gate = {"verdict": "promote", "reason": pending.reason}
    question = {"approval": nightly_approvals.stored(pending)}
    result = {"promoted": False, "verdict": "promote", "champion": champion} | question
    for stage, recorded in (("train", {"version": version}), ("gate", gate), ("promote", result)):
        nightly.record_step(session, run, name, stage, StepStatus.DONE, recorded)
    nightly.finish_run(session, run)
    return pending
