"""The budget of a run."""

from __future__ import annotations

from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramill.pipelines.nightly.budget import Spending, busy_seconds, decide_training
from loramill.pipelines.nightly.definition import BudgetDefinition

SPENT = Spending(wall_seconds=3600, gpu_seconds=1000, tokens=50_000)


@pytest.mark.parametrize(
    ("budget", "next_tokens", "start", "reason"),
    [
        (BudgetDefinition(), 10**12, True, "the budget is not spent"),
        (BudgetDefinition(wall_time=timedelta(hours=1)), 0, False, "the run's time of 1h is over"),
        (BudgetDefinition(wall_time=timedelta(seconds=3601)), 0, True, "the budget is not spent"),
        (BudgetDefinition(gpu_seconds=1000), 0, False, "1,000 of the run's 1,000 GPU-seconds are spent"),
        (BudgetDefinition(gpu_seconds=1001), 0, True, "the budget is not spent"),
        (BudgetDefinition(tokens=60_000), 10_000, True, "the budget is not spent"),
        (
            BudgetDefinition(tokens=60_000),
            10_001,
            False,
            "50,000 of the run's 60,000 tokens are spent, and this job trains on 10,001",
        ),
    ],
)
def test_training_starts_while_no_part_of_the_budget_is_spent(
    budget: BudgetDefinition, next_tokens: int, start: bool, reason: str
) -> None:
    found = decide_training(budget, SPENT, next_tokens)
    assert (found.start, found.reason) == (start, reason)


def test_jobs_of_one_session_share_its_seconds() -> None:
    jobs = [(0.0, 10.0), (2.0, 8.0), (3.0, 4.0)]
    assert busy_seconds(jobs, 1) == 10.0
    assert busy_seconds(jobs, 2) == 16.0
    assert busy_seconds(jobs, 8) == 17.0
    assert busy_seconds([], 4) == 0.0
    assert busy_seconds([(0.0, 1.0), (5.0, 6.0)], 1) == 2.0


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)).map(sorted).map(tuple)), st.integers(1, 5))
def test_busy_seconds_are_those_counted_second_by_second(jobs: list[tuple[int, int]], sessions: int) -> None:
    counted = sum(min(sessions, sum(start <= second < end for start, end in jobs)) for second in range(50))
    assert busy_seconds(jobs, sessions) == counted
