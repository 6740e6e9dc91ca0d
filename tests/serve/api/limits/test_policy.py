"""The policy of limits: by tables, by properties, and against traffic that is counted one by one."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loramill.serve.api.limits.policy import MINUTE_SECONDS, decide, format_duration, merge_windows, roll_to_minute
from loramill.types import Limits, RateWindow

counts = st.integers(0, 50)
windows = st.builds(
    RateWindow,
    minute=st.just(7),
    requests=counts,
    previous_requests=counts,
    tokens=counts,
    previous_tokens=counts,
    running_requests=st.integers(0, 3),
    reserved_tokens=st.integers(0, 30),
)
limit = st.none() | st.integers(1, 40)
limited = st.builds(Limits, requests_per_minute=limit, tokens_per_minute=limit, concurrent_requests=limit)
moments = st.floats(7 * MINUTE_SECONDS, 8 * MINUTE_SECONDS, exclude_max=True)


@pytest.mark.parametrize(
    ("limits", "used", "second", "wait", "kind"),
    [
        ({}, {"requests": 10**9, "running_requests": 10**9}, 0, 0.0, "requests"),
        ({"requests_per_minute": 3}, {"requests": 2}, 10, 0.0, "requests"),
        # A third of this minute's three has faded at the 20th second of the next one.
        ({"requests_per_minute": 3}, {"requests": 3}, 10, 70.0, "requests"),
        ({"requests_per_minute": 1}, {"requests": 1}, 10, 110.0, "requests"),
        # The last minute's four count as three a quarter into this one, and must come down to two.
        ({"requests_per_minute": 3}, {"previous_requests": 4}, 15, 15.0, "requests"),
        ({"requests_per_minute": 3}, {"previous_requests": 4}, 30, 0.0, "requests"),
        ({"tokens_per_minute": 100}, {"tokens": 90}, 0, 0.0, "requests"),
        ({"tokens_per_minute": 100}, {"tokens": 91}, 0, 60 + 60 / 91, "tokens"),
        ({"tokens_per_minute": 100}, {"reserved_tokens": 91}, 0, 1.0, "tokens"),
        ({"tokens_per_minute": 5}, {}, 0, 0.0, "requests"),  # larger than the limit, but alone
        ({"tokens_per_minute": 5}, {"previous_tokens": 1}, 59, 1.0, "tokens"),
        ({"concurrent_requests": 2}, {"running_requests": 1}, 0, 0.0, "requests"),
        ({"concurrent_requests": 2}, {"running_requests": 2}, 0, 1.0, "requests"),
        # The longer wait decides.
        (
            {"concurrent_requests": 1, "tokens_per_minute": 100},
            {"running_requests": 1, "previous_tokens": 100},
            0,
            6.0,
            "tokens",
        ),
    ],
)
def test_how_long_a_request_waits(
    limits: dict[str, int], used: dict[str, int], second: float, wait: float, kind: str
) -> None:
    decision = decide(Limits(**limits), RateWindow(7, **used), 10, 7 * MINUTE_SECONDS + second)
    assert decision.wait_seconds == pytest.approx(wait)
    assert (decision.allowed, bool(decision.reason)) == (wait == 0, wait > 0)
    assert decision.allowed or decision.kind == kind


def test_what_is_left_is_reported_as_openai_does() -> None:
    limits = Limits(requests_per_minute=10, tokens_per_minute=1000)
    used = RateWindow(7, requests=2, previous_requests=6, tokens=100, reserved_tokens=50)
    assert decide(limits, used, 30, 7 * MINUTE_SECONDS + 30).headers == {
        "x-ratelimit-limit-requests": "10",
        "x-ratelimit-remaining-requests": "4",
        "x-ratelimit-reset-requests": "1m30s",
        "x-ratelimit-limit-tokens": "1000",
        "x-ratelimit-remaining-tokens": "820",
        "x-ratelimit-reset-tokens": "1m30s",
    }
    assert decide(Limits(), used, 30, 7 * MINUTE_SECONDS).headers == {}
    alone = decide(Limits(requests_per_minute=1), RateWindow(7), 1, 7 * MINUTE_SECONDS).headers
    assert (alone["x-ratelimit-remaining-requests"], alone["x-ratelimit-reset-requests"]) == ("0", "2m0s")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (0.0001, "1ms"), (0.12, "120ms"), (1, "1s"), (7.5, "7.5s"), (59.9999, "1m0s"), (360, "6m0s")],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_a_window_in_other_minutes() -> None:
    window = RateWindow(
        7, requests=3, previous_requests=9, tokens=5, previous_tokens=8, running_requests=2, reserved_tokens=4
    )
    assert roll_to_minute(window, 7) is window
    assert roll_to_minute(window, 8) == RateWindow(
        8, previous_requests=3, previous_tokens=5, running_requests=2, reserved_tokens=4
    )
    assert roll_to_minute(window, 9) == RateWindow(9, running_requests=2, reserved_tokens=4)
    assert merge_windows([window, RateWindow(8, requests=1), RateWindow(2, requests=100)], 8) == RateWindow(
        8, requests=1, previous_requests=3, previous_tokens=5, running_requests=2, reserved_tokens=4
    )
    assert merge_windows([], 8) == RateWindow(8)


@given(limited, windows, st.integers(1, 60), moments)
def test_after_the_wait_a_request_passes_if_no_other_came(
    limits: Limits, used: RateWindow, tokens: int, now: float
) -> None:
    decision = decide(limits, used, tokens, now)
    assert 0 <= decision.wait_seconds <= 2 * MINUTE_SECONDS
    settled = replace(
        used, running_requests=0, reserved_tokens=0
    )  # running requests end meanwhile, and have used nothing
    later = now + decision.wait_seconds + 1e-6
    assert decide(limits, roll_to_minute(settled, int(later // MINUTE_SECONDS)), tokens, later).allowed


@given(limited, windows, st.integers(1, 60), moments)
def test_more_use_never_shortens_the_wait(limits: Limits, used: RateWindow, tokens: int, now: float) -> None:
    # If only the end of other requests helps, the length of the wait is a guess, but not whether to wait.
    more = replace(used, requests=used.requests + 1, tokens=used.tokens + 1, running_requests=used.running_requests + 1)
    if decide(limits, more, tokens, now).allowed:
        assert decide(limits, used, tokens, now).allowed


@given(limited, windows, st.integers(1, 60), moments)
def test_what_is_left_is_between_zero_and_the_limit(limits: Limits, used: RateWindow, tokens: int, now: float) -> None:
    decision = decide(limits, used, tokens, now)
    for quota, most in ((decision.requests, limits.requests_per_minute), (decision.tokens, limits.tokens_per_minute)):
        assert (quota is None) == (most is None)
        assert quota is None or (
            0 <= quota.remaining <= quota.limit == most and 0 <= quota.reset_seconds <= 2 * MINUTE_SECONDS
        )


@settings(max_examples=50)
@given(st.integers(1, 20), st.lists(st.floats(0, 20), min_size=50, max_size=150))
def test_no_clock_minute_admits_more_than_the_limit(most: int, gaps: list[float]) -> None:
    now, window, passed = 0.0, RateWindow(0), []
    for gap in gaps:
        now += gap
        window = roll_to_minute(window, int(now // MINUTE_SECONDS))
        if decide(Limits(requests_per_minute=most), window, 1, now).allowed:
            window = replace(window, requests=window.requests + 1)
            passed.append(now)
    minutes = [
        sum(int(at // MINUTE_SECONDS) == minute for at in passed) for minute in range(int(now // MINUTE_SECONDS) + 1)
    ]
    assert max(minutes) <= most
    # Two windows of the count touch any sixty seconds.
    assert all(sum(start <= at < start + MINUTE_SECONDS for at in passed) < 2 * most for start in passed)
    assert passed
