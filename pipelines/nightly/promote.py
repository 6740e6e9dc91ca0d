"""The last two stages: the gate decides about each challenger, and its decision is carried out."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from loramill.errors import Conflict
from loramill.names import SHORT_HASH_LENGTH, AdapterName
from loramill.pipelines.nightly.context import NightlyContext
from loramill.pipelines.nightly.evaluation.progress import decide_recorded
from loramill.pipelines.nightly.gate.candidates import GateDecision, GateVerdict
from loramill.pipelines.nightly.rollout.introduce import introduce
from loramill.registry import adapters, evaluations
from loramill.types import Alias


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
        champion = adapters.get(session, name).champion
        final, started = decision, None
        if decision.promote and collected and champion not in (collected["champion"], version):
            now = champion and champion[:SHORT_HASH_LENGTH]
            final = _held(decision, f"its champion became {now} during the run; run it again")
        elif decision.promote:
            definition = context.definition.for_adapter(adapter)
            try:
                started = introduce(
                    session,
                    name,
                    version,
                    canary=definition.canary,
                    watch=definition.watch,
                    run=context.run.id,
                    reason=f"{run}: {decision.reason}",
                )
            except Conflict as error:  # the tenant has pinned the champion
                final = _held(decision, error.message)
        elif champion == version:
            final = decision.model_copy(update={"reason": f"{decision.reason}; {_stays(name, collected)}"})
        if final is not decision:
            context.finish(session, adapter, "gate", final.model_dump(mode="json"))
        if not final.promote:
            adapters.move(session, name, Alias.CHALLENGER, None, f"{run}: {final.reason}")
        champion = adapters.get(session, name).champion
        promoted = final.promote and started is None
        result = {"promoted": promoted, "verdict": final.verdict.value, "champion": champion}
        if started is not None:
            result["rollout"] = started.value
        context.finish(session, adapter, "promote", result)


def _stays(name: AdapterName, collected: Mapping[str, Any] | None) -> str:
    """Why a version that the gate does not promote is the champion."""
    if collected is None or collected["champion"] is None:
        return "as the first version it is the champion all the same"
    return f"it was promoted before and stays the champion, until `loramill rollback {name}`"


def _held(decision: GateDecision, reason: str) -> GateDecision:
    return decision.model_copy(update={"verdict": GateVerdict.HOLD, "reason": reason})
