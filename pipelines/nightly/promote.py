"""The last two stages: the gate decides about each challenger, and its decision is carried out."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from typing import Any

from sqlalchemy.orm import Session

from loramill.errors import Conflict
from loramill.names import SHORT_HASH_LENGTH, AdapterName
from loramill.pipelines.nightly.context import NightlyContext
from loramill.pipelines.nightly.evaluation.progress import decide_recorded
from loramill.pipelines.nightly.gate.candidates import GateDecision, GateVerdict
from loramill.pipelines.nightly.rollouts.introduce import introduction
from loramill.registry import adapters, evaluations, nightly_approvals
from loramill.registry.rollouts import moves
from loramill.types import Alias, Approval


def gate_all(context: NightlyContext) -> None:
    """Decides on each challenger, and records the decision."""
    for adapter in context.remaining("gate"):
        context.attempt(adapter, "gate", partial(_gate, context, adapter))


def _gate(context: NightlyContext, adapter: str) -> None:
    artifacts, artifact = context.registry.artifacts, context.finished(adapter, "evaluate")["results"]
    results, left = evaluations.read_results(artifacts, artifact), evaluations.read_left(artifacts, artifact)
    decision = decide_recorded(results, left, context.definition.for_adapter(adapter).gate)
    with context.registry.writing() as session:
        context.finish(session, adapter, "gate", decision.model_dump(mode="json"))


def promote_all(context: NightlyContext) -> None:
    """Carries out the decisions: the champion alias moves, or no alias does."""
    for adapter in context.remaining("promote"):
        context.attempt(adapter, "promote", partial(_promote, context, adapter))


def _promote(context: NightlyContext, adapter: str) -> None:
    decision = GateDecision.model_validate(context.finished(adapter, "gate"))
    version = context.finished(adapter, "train")["version"]
    collected = context.result(adapter, "collect")
    name = AdapterName.parse(adapter)
    run = f"nightly run {context.run.id}"
    with context.registry.writing() as session:
        adapters.lock(session, name)  # else its champion could become one that the challenger was not compared with
        champion = adapters.get(session, name).champion
        final, taken = decision, dict[str, Any]()
        if decision.promote and collected and champion not in (collected["champion"], version):
            now = champion and champion[:SHORT_HASH_LENGTH]
            final = _held(decision, f"its champion became {now} during the run; run it again")
        elif decision.promote:
            try:
                taken = _take_over(context, session, name, version, decision.reason)
            except Conflict as error:  # the tenant has pinned the champion
                final = _held(decision, error.message)
        elif champion == version:
            final = decision.model_copy(update={"reason": f"{decision.reason}; {_stays(name, collected)}"})
        if final is not decision:
            context.finish(session, adapter, "gate", final.model_dump(mode="json"))
        if not final.promote:
            adapters.move(session, name, Alias.CHALLENGER, None, f"{run}: {final.reason}")
        champion = adapters.get(session, name).champion
        promoted = final.promote and not taken
        result = {"promoted": promoted, "verdict": final.verdict.value, "champion": champion}
        context.finish(session, adapter, "promote", result | taken)


def _take_over(
    context: NightlyContext, session: Session, name: AdapterName, version: str, reason: str
) -> dict[str, Any]:
    """Introduces a challenger that passed the gate, or asks whether to; either ends the wait of an older challenger.

    The caller has locked the adapter.

    Returns:
        What the step records of it: `rollout`, `approval`, or nothing if the version was promoted.

    Raises:
        Conflict: the adapter is pinned.
    """
    definition, run = context.definition.for_adapter(str(name)), context.run.id
    how = introduction(definition.canary, definition.watch)
    champion = adapters.get(session, name).champion
    if definition.gate.approval == "automatic" or champion in (None, version):
        started = moves.introduce(session, name, version, how, run=run, reason=f"nightly run {run}: {reason}")
        nightly_approvals.supersede(session, name, run)
        return {} if started is None else {"rollout": started.value}
    adapters.check_not_pinned(session, name)
    nightly_approvals.supersede(session, name, run)
    pending = Approval(
        run=run,
        adapter=str(name),
        version=version,
        champion=str(champion),
        reason=reason,
        introduction=how,
        requested_at=time.time(),
    )
    return {"approval": nightly_approvals.stored(pending)}


def _stays(name: AdapterName, collected: Mapping[str, Any] | None) -> str:
    """Why a version that the gate does not promote is the champion."""
    if collected is None or collected["champion"] is None:
        return "as the first version it is the champion all the same"
    return f"it was promoted before and stays the champion, until `loramill rollback {name}`"


def _held(decision: GateDecision, reason: str) -> GateDecision:
    return decision.model_copy(update={"verdict": GateVerdict.HOLD, "reason": reason})
