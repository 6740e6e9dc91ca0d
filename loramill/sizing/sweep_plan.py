"""Whether the candidates of a sweep fit one session, and the options with which they do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from loramill.errors import DoesNotFit
from loramill.sizing.planner import SizingPlan, SizingRequest, candidate_plans, format_bytes, relative_cost
from loramill.sizing.targets import TrainedElements, trained_elements
from loramill.sizing.tenants import PASS_TOKENS, SessionJob, estimate_session
from loramill.types import JobSpec


def plan_sweep(request: SizingRequest, pass_tokens: int | None = None) -> tuple[JobSpec, str]:
    """The fastest choice with which all candidates of a sweep fit one session.

    Args:
        request: the job.
        pass_tokens: maximum tokens of a pass with several candidates; None: that of the device.

    Returns:
        The spec with everything chosen, and the plan as a sentence.

    Raises:
        DoesNotFit: none fits; the message gives the number of candidates that would.
        InvalidRequest: a target, layer or pattern of a candidate matches nothing.
    """
    budget = request.pool.budget_bytes
    trained = [trained_elements(spec, request.base) for spec in request.spec.trained_specs]
    needed = partial(_needed_bytes, request, pass_tokens or PASS_TOKENS[request.pool.device])
    fit = [each for each in candidate_plans(request) if needed(each, trained) <= budget]
    if not fit:
        smallest = min(candidate_plans(request), key=lambda each: needed(each, trained))
        raise _refusal(trained, partial(needed, smallest), budget)
    chosen = min(fit, key=partial(relative_cost, request))
    spec = chosen.spec
    how = f"micro_tokens = {spec.micro_tokens}" + ", gradient_checkpointing = true" * spec.gradient_checkpointing
    taken = format_bytes(needed(chosen, trained))
    return spec, f"Fits: {len(trained)} candidates take about {taken} of {format_bytes(budget)} with {how}."


def _needed_bytes(
    request: SizingRequest, pass_tokens: int, plan: SizingPlan, trained: Sequence[TrainedElements]
) -> int:
    """The memory of a session with the plan's options for each of these candidates."""
    specs = plan.spec.trained_specs
    jobs = [SessionJob(spec, each, plan.row) for spec, each in zip(specs, trained, strict=False)]
    return estimate_session(
        jobs, request.base, request.quantization, request.pool.device, pass_tokens=pass_tokens
    ).bytes


def _refusal(
    trained: Sequence[TrainedElements], needed: Callable[[Sequence[TrainedElements]], int], budget: int
) -> DoesNotFit:
    most = sum(needed(trained[: count + 1]) <= budget for count in range(len(trained)))
    advice = f"the first {most} fit" if most else "not even one fits"
    return DoesNotFit(
        f"The {len(trained)} candidates of the sweep need {format_bytes(needed(trained))} in one session, but "
        f"{format_bytes(budget)} are available; {advice}. Give fewer values, lower ranks or fewer targets.",
        nearest=[f"{most} candidates"] if most > 1 else [],
        param="loramill.sweep",
    )
