"""How the time of sessions is divided among their jobs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramill.pipelines.nightly.report.cost import JobInterval, shared_seconds


def test_jobs_of_a_session_share_the_time_in_which_it_holds_both() -> None:
    intervals = [JobInterval("a", "one", 0, 10), JobInterval("b", "one", 5, 20), JobInterval("c", "two", 0, 3)]
    assert shared_seconds(intervals) == {"a": 7.5, "b": 12.5, "c": 3}


def test_a_trainer_counts_all_its_gpus_and_a_part_of_a_gpu_counts_less() -> None:
    intervals = [JobInterval("a", "trainer", 0, 10, devices=4), JobInterval("b", "session", 0, 10, devices=0.5)]
    assert shared_seconds(intervals) == {"a": 40, "b": 5}


def test_attempts_of_a_job_add_up_and_one_without_a_length_costs_nothing() -> None:
    intervals = [JobInterval("a", "one", 0, 10), JobInterval("a", "two", 20, 25), JobInterval("b", "one", 7, 7)]
    assert shared_seconds(intervals) == {"a": 15, "b": 0}


@given(
    st.lists(
        st.builds(
            JobInterval,
            st.sampled_from("abc"),
            st.sampled_from(["one", "two"]),
            st.integers(0, 50).map(float),
            st.integers(0, 50).map(float),
        )
    )
)
def test_the_parts_add_up_to_the_time_in_which_sessions_held_jobs(intervals: list[JobInterval]) -> None:
    held = sum(
        any(each.owner == owner and each.start <= second < each.end for each in intervals)
        for owner in ("one", "two")
        for second in range(50)
    )
    assert sum(shared_seconds(intervals).values()) == pytest.approx(held)
