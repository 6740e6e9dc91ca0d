"""How many equal jobs fit one session on a device, what one more costs, and the options with which N of them fit."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from functools import partial

from loramill.errors import DoesNotFit, InvalidRequest
from loramill.sizing.memory import MemoryEstimate
from loramill.sizing.planner import SizingPlan, SizingRequest, candidate_plans, format_bytes, plan_as_is, relative_cost
from loramill.sizing.targets import TrainedElements, trained_elements
from loramill.sizing.tenants import SessionJob, estimate_session

#: Jobs of a session above which no one counts further.
MAX_TENANTS = 2**16


@dataclass(frozen=True, slots=True)
class SessionPlan:
    """The plan of N equal jobs, one per tenant, in one session.

    Attributes:
        tenants: N.
        job: the plan of one of them alone; its spec has everything chosen.
        memory: of the session.
        next_bytes: what one more job takes.
        most: number of such jobs that fit, at most `MAX_TENANTS`; None: the size of the device is not known.
    """

    tenants: int
    job: SizingPlan
    memory: MemoryEstimate
    next_bytes: int
    most: int | None

    @property
    def explanation(self) -> str:
        """The plan in two sentences."""
        spec = self.job.spec
        how = f"micro_tokens = {spec.micro_tokens}" + ", gradient_checkpointing = true" * spec.gradient_checkpointing
        more = f"One more takes {format_bytes(self.next_bytes)}"
        if self.most is None:
            return f"{self.tenants:,} such jobs in one session take about {format_bytes(self.memory.bytes)}. {more}."
        budget = format_bytes(self.job.pool.budget_bytes)
        return (
            f"Fits: {self.tenants:,} such jobs in one session take about {format_bytes(self.memory.bytes)} of {budget} "
            f"with {how}. {more}; {self.most:,} fit."
        )


def plan_session(request: SizingRequest, tenants: int) -> SessionPlan:
    """The fastest choice with which N equal jobs fit one session; of a device of 0 bytes, no choice.

    Args:
        request: one of the jobs.
        tenants: N, at least 1.

    Raises:
        DoesNotFit: none fits; the message says how many jobs would.
        InvalidRequest: the method is "full", or a target, layer or pattern matches nothing.
    """
    if request.spec.method == "full":
        raise InvalidRequest(
            "A full fine-tuning has a base of its own, so that no others train in its session: leave 'tenants' out, or "
            "use another method.",
            param="tenants",
        )
    trained, budget = trained_elements(request.spec, request.base), request.pool.budget_bytes
    if not budget:
        return _plan_of(request, plan_as_is(request, request.spec, trained), trained, tenants, None)
    fit = [each for each in candidate_plans(request) if _memory(request, each, trained, tenants).bytes <= budget]
    if not fit:
        raise _refusal(request, trained, tenants)
    fastest = min(fit, key=partial(relative_cost, request))
    return _plan_of(request, fastest, trained, tenants, _most(request, fastest, trained))


def _plan_of(
    request: SizingRequest, job: SizingPlan, trained: TrainedElements, tenants: int, most: int | None
) -> SessionPlan:
    memory = _memory(request, job, trained, tenants)
    more = _memory(request, job, trained, tenants + 1).bytes - memory.bytes
    return SessionPlan(tenants, job, memory, more, most)


def _memory(request: SizingRequest, job: SizingPlan, trained: TrainedElements, tenants: int) -> MemoryEstimate:
    jobs = [SessionJob(job.spec, trained, job.row)] * tenants
    return estimate_session(jobs, request.base, request.quantization, request.pool.device)


def _most(request: SizingRequest, job: SizingPlan, trained: TrainedElements) -> int:
    """The largest number of jobs that fit with the options of a plan; 0 if none does."""

    def fits(tenants: int) -> bool:
        return _memory(request, job, trained, tenants).bytes <= request.pool.budget_bytes

    # The memory grows with each job, so that the number lies between one that fits and its double.
    high = 1
    while high < MAX_TENANTS and fits(high):
        high *= 2
    return bisect_left(range(1, high + 1), True, key=lambda tenants: not fits(tenants))


def _refusal(request: SizingRequest, trained: TrainedElements, tenants: int) -> DoesNotFit:
    most = max(_most(request, each, trained) for each in candidate_plans(request))
    smallest = min(_memory(request, each, trained, tenants).bytes for each in candidate_plans(request))
    nearest = [f"tenants = {most}"] if most else []
    advice = f"{most:,} fit; for more, use a lower rank, fewer targets or another session" if most else "Not one fits"
    return DoesNotFit(
        f"{tenants:,} such jobs in one session need {format_bytes(smallest)} of memory, but "
        f"{format_bytes(request.pool.budget_bytes)} are available. {advice}.",
        nearest=nearest,
        param="tenants",
    )
