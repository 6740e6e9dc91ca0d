"""The decision about a rollout."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramill.pipelines.nightly.rollouts.policy import PATIENCE_SECONDS, RolloutVerdict, decide
from loramill.types import RolloutKind, RolloutState, TrafficCounts, WatchPolicy
from loramill.types.rollouts import latency_bucket

CONTINUE, PROMOTE, ROLL_BACK = RolloutVerdict
END = 3600.0
LAST = END + PATIENCE_SECONDS


def counts(requests: int, *, seconds: float = 0.1, **signals: int) -> TrafficCounts:
    answers = requests - signals.get("errors", 0)
    histogram = {latency_bucket(seconds): answers} if answers else {}
    return TrafficCounts(requests=requests, total_histogram=histogram, **signals)


def state(
    tried: TrafficCounts,
    compared: TrafficCounts,
    *,
    kind: RolloutKind = RolloutKind.CANARY,
    ends_at: float | None = END,
    **policy: Any,
) -> RolloutState:
    return RolloutState(
        id=1,
        adapter="acme/support",
        kind=kind,
        version="2" * 64,
        baseline="1" * 64,
        share=0.1,
        run=None,
        policy=WatchPolicy(**policy),
        started_at=0.0,
        ends_at=ends_at,
        tried=tried,
        compared=compared,
    )


GOOD = counts(1000)


@pytest.mark.parametrize(
    ("tried", "compared", "early", "late"),
    [
        pytest.param(counts(0), counts(0), CONTINUE, PROMOTE, id="nothing"),
        pytest.param(counts(200), GOOD, CONTINUE, PROMOTE, id="as good"),
        pytest.param(counts(10, errors=3), GOOD, CONTINUE, ROLL_BACK, id="few requests, some of them fail"),
        pytest.param(counts(10, cut=1), counts(1000, cut=30), CONTINUE, PROMOTE, id="one unlucky request of ten"),
        pytest.param(counts(50, errors=50), GOOD, ROLL_BACK, ROLL_BACK, id="all fail"),
        pytest.param(counts(50, errors=5), GOOD, ROLL_BACK, ROLL_BACK, id="some fail"),
        pytest.param(counts(50, errors=2), counts(50, errors=1), CONTINUE, PROMOTE, id="one failure more"),
        pytest.param(counts(100, errors=50), counts(0), ROLL_BACK, ROLL_BACK, id="nothing to compare failures with"),
        pytest.param(counts(100, empty=60), counts(0), CONTINUE, PROMOTE, id="nothing to compare empty answers with"),
        pytest.param(counts(50, empty=40), counts(0), ROLL_BACK, ROLL_BACK, id="most answers are empty"),
        pytest.param(counts(50, empty=9), counts(9), CONTINUE, PROMOTE, id="a few empty answers and a short baseline"),
        pytest.param(counts(50, empty=40), counts(9), ROLL_BACK, ROLL_BACK, id="empty answers and a short baseline"),
        pytest.param(counts(100, empty=30), GOOD, ROLL_BACK, ROLL_BACK, id="empty answers"),
        pytest.param(counts(100, cut=30), GOOD, ROLL_BACK, ROLL_BACK, id="answers at their length limit"),
        pytest.param(counts(100, cut=30), counts(1000, cut=290), CONTINUE, PROMOTE, id="as many as before"),
        pytest.param(counts(9999, cut=300), counts(9999, cut=30), CONTINUE, PROMOTE, id="a rise that is allowed"),
        pytest.param(counts(100, good=10, bad=20), counts(99, good=50), ROLL_BACK, ROLL_BACK, id="bad ratings"),
        pytest.param(counts(100, good=2, bad=1), counts(99, good=50), CONTINUE, PROMOTE, id="one bad rating"),
        pytest.param(counts(100, seconds=0.3), GOOD, ROLL_BACK, ROLL_BACK, id="three times as slow"),
        pytest.param(counts(100, seconds=0.12), GOOD, CONTINUE, PROMOTE, id="a little slower"),
    ],
)
def test_a_version_is_judged_by_its_answers(tried: Any, compared: Any, early: Any, late: Any) -> None:
    assert decide(state(tried, compared), now=END - 1).verdict is early
    enough = tried.requests >= WatchPolicy().min_requests
    assert decide(state(tried, compared), now=END).verdict is (late if enough else CONTINUE)
    assert decide(state(tried, compared), now=LAST - 1).verdict is (late if enough else CONTINUE)
    assert decide(state(tried, compared), now=LAST).verdict is late


def test_a_canary_without_an_end_is_never_promoted() -> None:
    assert decide(state(GOOD, GOOD, ends_at=None), now=1e9).verdict is CONTINUE
    assert decide(state(counts(100, errors=50), GOOD, ends_at=None), now=0).verdict is ROLL_BACK


def test_copies_may_be_slower() -> None:
    slow = counts(100, seconds=3.0)
    assert decide(state(slow, GOOD, kind=RolloutKind.SHADOW), now=END).verdict is PROMOTE
    assert decide(state(slow, GOOD, kind=RolloutKind.CANARY), now=END).verdict is ROLL_BACK


def test_an_hour_in_which_all_adapters_are_slower_rolls_nothing_back() -> None:
    watch = state(counts(100, seconds=0.3), GOOD, kind=RolloutKind.WATCH)
    assert decide(watch, now=0).verdict is ROLL_BACK
    assert decide(watch.model_copy(update={"slowdown": 3.0}), now=0).verdict is CONTINUE
    slower = state(counts(100, seconds=3.0), GOOD, kind=RolloutKind.WATCH).model_copy(update={"slowdown": 3.0})
    assert "1.5 times as long is allowed, times 3 as all adapters are slower" in decide(slower, now=0).reason


def test_a_watch_with_too_few_requests_moves_nothing() -> None:
    few = state(counts(10, errors=10), GOOD, kind=RolloutKind.WATCH)
    assert decide(few, now=END).verdict is CONTINUE
    assert decide(few, now=LAST).verdict is PROMOTE
    assert "too few" in decide(few, now=LAST).reason


def test_reasons_name_rates_and_what_is_allowed() -> None:
    reason = decide(state(counts(100, errors=7, cut=30), GOOD), now=0).reason
    assert reason == (
        "failed requests rose from 0.0% to 7.0%; at most +2.0% is allowed; answers cut at their length limit rose from "
        "0.0% to 32.3%; at most +5.0% is allowed (100 requests)"
    )
    slow = decide(state(counts(100, seconds=0.4), GOOD), now=0).reason
    assert "median time per answer rose from 0.11 s to 0.43 s; at most 1.5 times as long" in slow


shares = st.integers(0, 400)


@given(errors=shares, old_errors=shares, more=st.integers(0, 50))
def test_more_failures_never_help_a_version(errors: int, old_errors: int, more: int) -> None:
    def rolled_back(events: int) -> bool:
        tried, compared = counts(450, errors=events), counts(450, errors=old_errors)
        return decide(state(tried, compared), now=0).verdict is ROLL_BACK

    assert rolled_back(errors + more) or not rolled_back(errors)


@given(errors=st.integers(0, 10), requests=st.integers(10, 49), old_errors=st.integers(0, 100))
def test_nothing_happens_before_the_smallest_number_of_requests(errors: int, requests: int, old_errors: int) -> None:
    tried, compared = counts(requests, errors=errors), counts(1000, errors=old_errors)
    assert decide(state(tried, compared), now=0).verdict is CONTINUE


@given(rate=st.sampled_from([0.0, 0.01, 0.1, 0.5]), seed=st.integers(0, 2**32))
def test_a_version_that_is_as_good_is_hardly_ever_rolled_back(rate: float, seed: int) -> None:
    random_ = random.Random(seed)
    rolled_back = 0
    for _ in range(20):
        events, old_events = (sum(random_.random() < rate for _ in range(300)) for _ in range(2))
        tried, compared = counts(300, cut=events), counts(300, cut=old_events)
        rolled_back += decide(state(tried, compared), now=0).verdict is ROLL_BACK
    assert rolled_back <= 2  # of 20 at a level of 0.001: three would be one in a million


@pytest.mark.parametrize("rate", [0.1, 0.3, 1.0])
def test_a_version_that_is_much_worse_is_rolled_back(rate: float) -> None:
    random_ = random.Random(1)
    for _ in range(50):
        cut = sum(random_.random() < 0.02 + rate for _ in range(500))
        tried, compared = counts(500, cut=cut), counts(1000, cut=20)
        assert decide(state(tried, compared), now=0).verdict is ROLL_BACK
