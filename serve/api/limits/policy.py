"""Rate limits: whether a request is allowed now, and if not, when. Pure functions of the usage so far.

A minute's count fades out evenly over the minute after it, so that no more than a limit passes in any sixty seconds
of even traffic, and no gateway needs to know each request of the others: the approximated sliding window of
Cloudflare's "Counting things, a lot of different things" (2017).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from loramill.types import Limits, RateWindow

MINUTE_SECONDS = 60.0

#: Seconds to wait if only the end of another request can help.
RETRY_SOON_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class QuotaState:
    """What is left of a limit, and the seconds until all of it is available."""

    limit: int
    remaining: int
    reset_seconds: float


@dataclass(frozen=True, slots=True)
class LimitDecision:
    """Whether a request is allowed.

    Attributes:
        wait_seconds: after how many seconds it is allowed; 0.0: now.
        kind: OpenAI's word for the limit that is reached.
        reason: a sentence about that limit; empty: the request is allowed.
        requests: what is left of the limit of requests; None: no limit.
        tokens: what is left of the limit of tokens; None: no limit.
    """

    wait_seconds: float
    kind: Literal["requests", "tokens"]
    reason: str
    requests: QuotaState | None
    tokens: QuotaState | None

    @property
    def allowed(self) -> bool:
        """Whether the request is allowed."""
        return not self.reason

    @property
    def headers(self) -> dict[str, str]:
        """OpenAI's `x-ratelimit-…` headers of the response."""
        quotas = {"requests": self.requests, "tokens": self.tokens}
        return {
            f"x-ratelimit-{name}-{kind}": value
            for kind, quota in quotas.items()
            if quota is not None
            for name, value in (
                ("limit", str(quota.limit)),
                ("remaining", str(quota.remaining)),
                ("reset", format_duration(quota.reset_seconds)),
            )
        }


def decide(limits: Limits, usage: RateWindow, tokens: int, now: float) -> LimitDecision:
    """Decides whether one more request is allowed.

    Args:
        limits: the tenant's limits.
        usage: the tenant's usage on all gateways together, in the minute of `now`.
        tokens: maximum number of tokens of the request. If it exceeds the limit, the request is allowed alone.
        now: seconds since the epoch.
    """
    elapsed = now % MINUTE_SECONDS
    waits: list[tuple[float, Literal["requests", "tokens"], str]] = []
    requests_left = tokens_left = None
    if (limit := limits.concurrent_requests) is not None and usage.running_requests >= limit:
        waits.append(
            (RETRY_SOON_SECONDS, "requests", f"{usage.running_requests} of {limit} concurrent requests are running")
        )
    if (limit := limits.requests_per_minute) is not None:
        wait = _wait_seconds(limit - 1, usage.requests, usage.previous_requests, elapsed)
        waits.append((wait, "requests", f"the limit is {limit} requests per minute"))
        requests_left = _quota_state(limit, usage.requests, usage.previous_requests, elapsed, 0 if wait else 1)
    if (limit := limits.tokens_per_minute) is not None:
        requested = min(tokens, limit)
        available = limit - requested - usage.reserved_tokens
        if available >= 0:
            wait = _wait_seconds(available, usage.tokens, usage.previous_tokens, elapsed)
        else:  # running requests must end first, and may use less than is reserved for them
            wait = max(
                RETRY_SOON_SECONDS, _wait_seconds(limit - requested, usage.tokens, usage.previous_tokens, elapsed)
            )
        reason = f"the limit is {limit} tokens per minute, and this request may use {tokens}"
        waits.append((wait, "tokens", reason))
        reserved = usage.reserved_tokens + (0 if wait else requested)
        tokens_left = _quota_state(limit, usage.tokens, usage.previous_tokens, elapsed, reserved)
    wait, kind, reason = max(waits, default=(0.0, "requests", ""), key=lambda each: each[0])
    return LimitDecision(wait, kind, reason if wait else "", requests_left, tokens_left)


def roll_to_minute(window: RateWindow, minute: int) -> RateWindow:
    """Returns the window in a later minute."""
    if window.minute == minute:
        return window
    requests, tokens = (window.requests, window.tokens) if window.minute == minute - 1 else (0, 0)
    return replace(window, minute=minute, requests=0, tokens=0, previous_requests=requests, previous_tokens=tokens)


def merge_windows(windows: Iterable[RateWindow], minute: int) -> RateWindow:
    """Returns the sum of several gateways' windows."""
    total = RateWindow(minute)
    for window in windows:
        now = roll_to_minute(window, minute)
        total = RateWindow(
            minute,
            total.requests + now.requests,
            total.previous_requests + now.previous_requests,
            total.tokens + now.tokens,
            total.previous_tokens + now.previous_tokens,
            total.running_requests + now.running_requests,
            total.reserved_tokens + now.reserved_tokens,
        )
    return total


def format_duration(seconds: float) -> str:
    """Formats seconds as in OpenAI's headers: "120ms", "1s", "7.5s", "6m0s"."""
    milliseconds = math.ceil(seconds * 1000)
    if 0 < milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(milliseconds, 60_000)
    return (f"{minutes}m" if minutes else "") + f"{rest / 1000:g}s"


def _wait_seconds(available: int, current: int, previous: int, elapsed: float) -> float:
    """Seconds until this minute's count and what is left of the previous one are at most `available`, which is >= 0."""
    if current <= available:
        fraction = (available - current) / previous if previous else 1.0
        return max(0.0, MINUTE_SECONDS * (1 - fraction) - elapsed)
    return MINUTE_SECONDS - elapsed + MINUTE_SECONDS * (1 - available / current)


def _quota_state(limit: int, current: int, previous: int, elapsed: float, reserved: int) -> QuotaState:
    left = limit - reserved - current - previous * (1 - elapsed / MINUTE_SECONDS)
    reset = 2 * MINUTE_SECONDS - elapsed if current + reserved else MINUTE_SECONDS - elapsed if previous else 0.0
    return QuotaState(limit, max(0, math.floor(left)), reset)
