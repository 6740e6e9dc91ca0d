"""The last two stages: the gate decides about each challenger, and its decision is carried out."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Any

from loramill.errors import Conflict
from loramill.names import SHORT_HASH_LENGTH, AdapterName
from loramill.pipelines.nightly.context import NightlyContext
from loramill.pipelines.nightly.gate import GateDecision, SliceScores, Thresholds, decide
from loramill.pipelines.nightly.scoring import Score
from loramill.registry import adapters
from loramill.types import Alias


def gate_all(context: NightlyContext) -> None:
    """Decides on each challenger, and records the decision."""
    for adapter in context.remaining("gate"):
        context.attempt(adapter, "gate", partial(_gate, context, adapter))


def _gate(context: NightlyContext, adapter: str) -> None:
    slices = [slice_scores(name, roles) for name, roles in context.done("evaluate")[adapter].items()]
    with context.registry.writing() as session:
        context.finish(session, adapter, "gate", asdict(decide(slices, Thresholds())))


def slice_scores(name: str, roles: dict[str, dict[str, Any]]) -> SliceScores:
    """A recorded evaluation as input of the gate."""
    champion = Score(**roles["champion"]) if "champion" in roles else None
    return SliceScores(name, Score(**roles["base"]), champion, Score(**roles["challenger"]))


def promote_all(context: NightlyContext) -> None:
    """Carries out the decisions: the champion alias moves, or no alias does."""
    for adapter in context.remaining("promote"):
        context.attempt(adapter, "promote", partial(_promote, context, adapter))


def _promote(context: NightlyContext, adapter: str) -> None:
    decision, version = GateDecision(**context.done("gate")[adapter]), context.done("train")[adapter]["version"]
    collected = context.done("collect").get(adapter)
    name = AdapterName.parse(adapter)
    run = f"nightly run {context.run.id}"
    with context.registry.writing() as session:
        champion = adapters.get(session, name).champion
        final = decision
        if decision.promote and collected and champion not in (collected["champion"], version):
            now = champion and champion[:SHORT_HASH_LENGTH]
            final = GateDecision(False, f"its champion became {now} during the run; run it again")
        elif decision.promote:
            try:
                adapters.promote(session, name, version, f"{run}: {decision.reason}")
            except Conflict as error:  # the tenant has pinned the champion
                final = GateDecision(False, error.message)
        elif champion == version:
            final = GateDecision(False, f"{decision.reason}; as the first version it is the champion all the same")
        if final is not decision:
            context.finish(session, adapter, "gate", asdict(final))
        if not final.promote:
            adapters.move(session, name, Alias.CHALLENGER, None, f"{run}: {final.reason}")
        champion = adapters.get(session, name).champion
        context.finish(session, adapter, "promote", {"promoted": final.promote, "champion": champion})
