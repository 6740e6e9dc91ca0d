"""The outcome of a nightly run, adapter by adapter, for reports. Pure functions of its steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from itertools import groupby
from operator import attrgetter
from typing import Any

from loramill.errors import first_lines
from loramill.pipelines.nightly.collection.counts import CollectedCounts
from loramill.pipelines.nightly.evaluation.results import GOLDEN_SLICE
from loramill.pipelines.nightly.gate.candidates import GateVerdict
from loramill.types import ApprovalState, FrozenModel, NightlyStep, StepStatus


class Verdict(StrEnum):
    """How a nightly run ended for an adapter."""

    PROMOTED = "promoted"
    HELD = "held"
    CANARY = "canary"  # it passed the gate, and answers a share of the requests
    SHADOW = "shadow"  # it passed the gate, and answers copies of a share
    REJECTED = "rejected"  # there is evidence of harm, or a person rejected it
    AWAITING = "awaiting approval"  # it passed the gate, and waits for a person
    FAILED = "failed"
    WAITING = "waiting"  # for more data
    SKIPPED = "skipped"  # nothing in its data is new
    INTERRUPTED = "interrupted"  # the next run resumes it
    RUNNING = "running"
    DELETED = "deleted"  # during the run


_GATE_VERDICTS = {
    GateVerdict.PROMOTE: Verdict.PROMOTED,
    GateVerdict.HOLD: Verdict.HELD,
    GateVerdict.REJECT: Verdict.REJECTED,
}
_APPROVAL_VERDICTS = {
    ApprovalState.PENDING: Verdict.AWAITING,
    ApprovalState.REJECTED: Verdict.REJECTED,
    ApprovalState.SUPERSEDED: Verdict.HELD,
}
#: Verdicts that make a nightly run end with exit status 1.
UNSUCCESSFUL = (Verdict.FAILED, Verdict.INTERRUPTED)


#: The metric of results that name none.
DEFAULT_METRIC = "token_f1"


class Outcome(FrozenModel):
    """The outcome of a nightly run for one adapter.

    Attributes:
        stage: the last stage that the adapter reached.
        reason: one or two sentences; empty while it runs.
        metric: the score that the gate decides by.
        base, champion, challenger: mean score over all held-out examples; None if not evaluated.
        counts: what became of its rows, by fate; all 0 if its data could not be collected.
        quarantine: ID of the file of quarantined rows.
        quarantined: why the first of them are quarantined.
    """

    adapter: str
    verdict: Verdict
    stage: str
    reason: str
    metric: str = DEFAULT_METRIC
    base: float | None = None
    champion: float | None = None
    challenger: float | None = None
    counts: CollectedCounts = CollectedCounts()
    quarantine: str | None = None
    quarantined: tuple[str, ...] = ()


def outcomes(steps: Sequence[NightlyStep]) -> list[Outcome]:
    """The outcome of each adapter, by name."""
    by_name = sorted(steps, key=attrgetter("adapter"))
    return [_outcome(adapter, list(group)) for adapter, group in groupby(by_name, key=attrgetter("adapter"))]


def summary(found: Sequence[Outcome]) -> str:
    """One line: the number of adapters per verdict, and which failed at which stage."""
    if not found:
        return "No adapter had new data."
    groups = [[each for each in found if each.verdict is verdict] for verdict in Verdict]
    return f"Nightly run: {', '.join(_counted(group) for group in groups if group)}."


def _counted(group: Sequence[Outcome]) -> str:
    verdict = group[0].verdict
    where = "; ".join(f"{each.adapter} at {each.stage}" for each in group) if verdict in UNSUCCESSFUL else ""
    return f"{len(group)} {verdict}{f' ({where})' if where else ''}"


def succeeded(found: Sequence[Outcome]) -> bool:
    """Whether no adapter failed or was interrupted."""
    return not any(each.verdict in UNSUCCESSFUL for each in found)


def describe(step: NightlyStep) -> str:
    """A finished step as a line of progress: "acme/support: promoted"."""
    return f"{step.adapter}: {_described(step)}"


def _described(step: NightlyStep) -> str:
    result = step.result
    match step.step, step.status:
        case _, StepStatus.FAILED:
            return str(result["error"]) if result.get("deleted") else f"{step.step} failed: {result.get('error')}"
        case _, StepStatus.PENDING:
            states = [f"{state}: {result[state]}" for state in ("waiting", "skipped") if state in result]
            return states[0] if states else f"{step.step} stopped: {result['error']}"
        case "gate", _:
            return "it is better" if _gate_verdict(result) is Verdict.PROMOTED else str(result["reason"])
        case "promote", _:
            return str(_gate_verdict(result))
        case stage, _:
            return {"collect": "data collected", "train": "trained", "evaluate": "evaluated"}[stage]


def _outcome(adapter: str, steps: list[NightlyStep]) -> Outcome:
    done = {step.step: step.result for step in steps if step.status is StepStatus.DONE}
    evaluated = done.get("evaluate", {})
    slices = evaluated.get("slices", evaluated)  # older runs recorded the slices alone
    metric = metric_of(done)
    scores = {role: _overall(slices, role, metric) for role in ("base", "champion", "challenger")}
    verdict, stage, reason = _verdict(adapter, steps, done)
    collected = next((step.result for step in steps if step.step == "collect"), {})
    quarantine = collected.get("quarantine", {})
    return Outcome(
        adapter=adapter,
        verdict=verdict,
        stage=stage,
        reason=reason,
        metric=metric,
        counts=CollectedCounts.model_validate(collected.get("counts", {})),
        quarantine=quarantine.get("file"),
        quarantined=quarantine.get("reasons", ()),
        **scores,
    )


def metric_of(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The metric that the gate compares, from the results of an adapter's steps by stage."""
    recorded = (results.get(stage, {}).get("metric") for stage in ("gate", "evaluate"))
    return str(next(filter(None, recorded), DEFAULT_METRIC))


def _verdict(adapter: str, steps: list[NightlyStep], done: Mapping[str, Mapping[str, Any]]) -> tuple[Verdict, str, str]:
    """The verdict, the stage and the reason."""
    for step in steps:
        if step.result.get("deleted"):
            return Verdict.DELETED, step.step, str(step.result["error"])
        if step.status is StepStatus.FAILED:
            error = first_lines(str(step.result.get("error") or "no reason was recorded")).rstrip(".")
            return Verdict.FAILED, step.step, f"{step.step}: {error}.{_next_step_hint(adapter, step.result)}"
    gate = done.get("gate")
    if gate is not None:
        promotion = done.get("promote", {})
        return _gate_verdict(promotion or gate), "promote", str(gate["reason"]) + _approval_words(promotion)
    last = steps[-1]
    for verdict in (Verdict.WAITING, Verdict.SKIPPED):
        if verdict in last.result:
            return verdict, last.step, str(last.result[verdict])
    if last.status is StepStatus.PENDING and last.result.get("error"):
        reason = f"{last.step}: {last.result['error']} `loramill nightly run` resumes it."
        return Verdict.INTERRUPTED, last.step, reason
    return Verdict.RUNNING, last.step, ""


def _approval_words(promotion: Mapping[str, Any]) -> str:
    """What a person decided about a challenger that passed the gate, as the end of its reason."""
    approval = promotion.get("approval")
    if approval is None:
        return ""
    by, note = approval["decided_by"], f": {approval['note']}" if approval["note"] else ""
    match ApprovalState(approval["state"]):
        case ApprovalState.PENDING:
            return "; it waits for approval"
        case ApprovalState.SUPERSEDED:
            return f"; no one approved it before the challenger of {by} passed the gate"
        case state:
            return f"; {state} by {by}{note}"


def _gate_verdict(result: Mapping[str, Any]) -> Verdict:
    """The verdict in the result of the gate's step, or of the promotion's."""
    state = ApprovalState(result.get("approval", {}).get("state", ApprovalState.APPROVED))
    if state is not ApprovalState.APPROVED:
        return _APPROVAL_VERDICTS[state]
    if "rollout" in result:
        return Verdict(result["rollout"])
    if "verdict" not in result:  # older runs recorded a boolean, under the name of the step
        return Verdict.PROMOTED if result.get("promote") or result.get("promoted") else Verdict.HELD
    return _GATE_VERDICTS[GateVerdict(result["verdict"])]


def _next_step_hint(adapter: str, result: Mapping[str, Any]) -> str:
    match result.get("data"):
        case "waiting":
            return " Its data waits for the next nightly run."
        case "set aside":
            return (
                f" Its data is set aside: `loramill nightly retry {adapter}` lets the next nightly run try again, "
                f"`loramill nightly drop {adapter}` discards it."
            )
        case _:
            return ""


def _overall(slices: Mapping[str, Mapping[str, Mapping[str, Any]]], role: str, metric: str) -> float | None:
    """A candidate's mean score over the slices; a slice of a part, such as `new:topic=tax`, has no other examples."""
    whole = [roles for name, roles in slices.items() if ":" not in name and name != GOLDEN_SLICE]
    parts = [roles[role] for roles in whole if metric in roles.get(role, {})]
    total = sum(part["examples"] for part in parts)
    return sum(part[metric] * part["examples"] for part in parts) / total if total else None
