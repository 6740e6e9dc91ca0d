"""The budget of a run: whether more training may start. Pure functions of what is spent and what is still to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loramill.durations import format_duration
from loramill.pipelines.nightly.definition import BudgetDefinition


@dataclass(frozen=True, slots=True)
class Spending:
    """What a run has spent.

    Attributes:
        wall_seconds: seconds since it began.
        gpu_seconds: seconds of its training, times the GPUs (on a CPU: sessions) in use.
        tokens: tokens of its jobs; of those that have not ended, all that they will train on.
    """

    wall_seconds: float
    gpu_seconds: float
    tokens: float


@dataclass(frozen=True, slots=True)
class BudgetDecision:
    """Whether a job may start, and the reason in one sentence, without a full stop."""

    start: bool
    reason: str


def decide_training(budget: BudgetDefinition, spent: Spending, next_tokens: float = 0) -> BudgetDecision:
    """Decides whether another job may start.

    Args:
        budget: what may be spent.
        spent: what is spent.
        next_tokens: tokens that the job trains on; 0 for a job whose tokens are in `spent` already.
    """
    wall = budget.wall_time.total_seconds() if budget.wall_time is not None else None
    if wall is not None and spent.wall_seconds >= wall:
        return BudgetDecision(False, f"the run's time of {format_duration(wall)} is over")
    if budget.gpu_seconds is not None and spent.gpu_seconds >= budget.gpu_seconds:
        return BudgetDecision(
            False, f"{spent.gpu_seconds:,.0f} of the run's {budget.gpu_seconds:,.0f} GPU-seconds are spent"
        )
    if budget.tokens is not None and spent.tokens + next_tokens > budget.tokens:
        needed = f", and this job trains on {next_tokens:,.0f}" if next_tokens else ""
        return BudgetDecision(False, f"{spent.tokens:,.0f} of the run's {budget.tokens:,} tokens are spent{needed}")
    return BudgetDecision(True, "the budget is not spent")


def busy_seconds(intervals: Sequence[tuple[float, float]], sessions: int) -> float:
    """Returns the session-seconds of jobs that trained in these intervals.

    Jobs are spread over the sessions, and those of one session train together: n jobs keep min(n, sessions) busy.
    """
    changes = sorted([(start, 1) for start, _ in intervals] + [(end, -1) for _, end in intervals])
    total, running, before = 0.0, 0, 0.0
    for at, change in changes:
        total += (at - before) * min(running, sessions)
        running, before = running + change, at
    return total
