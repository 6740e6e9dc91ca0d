"""A tenant's limits: whether a request may pass now, and else when. Pure; what was used is given, and by whom.

A minute's count fades out evenly over the minute after it, so that no more than a limit passes in any sixty seconds
of even traffic, and no gateway needs to know each request of the others: the approximated sliding window of
Cloudflare's "Counting things, a lot of different things" (2017).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from loramill.types import Limits, Meter

MINUTE = 60.0

#: Seconds after which to ask again, where only the end of another request makes room.
SOON = 1.0


@dataclass(frozen=True, slots=True)
class Quota:
    """What is left of a limit, and the seconds until all of it will be."""

    limit: int
    remaining: int
    reset: float


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether a request may pass: `wait` is 0.0, or the seconds after which it may.

    Attributes:
        kind: OpenAI's word for what there is too much of, and `reason` a sentence about it; empty if it may pass.
        requests, tokens: what is left of the minute once it has; None: no limit.
    """

    wait: float
    kind: Literal["requests", "tokens"]
    reason: str
    requests: Quota | None
    tokens: Quota | None

    @property
    def allowed(self) -> bool:
        """Whether the request may pass."""
        return not self.reason

    @property
    def headers(self) -> dict[str, str]:
        """OpenAI's `x-ratelimit-…` headers of the answer."""
        quotas = {"requests": self.requests, "tokens": self.tokens}
        return {
            f"x-ratelimit-{name}-{kind}": value
            for kind, quota in quotas.items()
            if quota is not None
            for name, value in (
                ("limit", str(quota.limit)),
                ("remaining", str(quota.remaining)),
                ("reset", duration(quota.reset)),
            )
        }


def decide(limits: Limits, used: Meter, tokens: int, now: float) -> Decision:
    """Decides about one more request.

    Args:
        used: what all gateways together have seen of the tenant; its minute is that of `now`.
        tokens: what the request may come to. One that is larger than the limit passes when nothing else counts.
        now: seconds since the epoch.
    """
    passed = now % MINUTE
    waits: list[tuple[float, Literal["requests", "tokens"], str]] = []
    requests_left = tokens_left = None
    if (limit := limits.concurrent_requests) is not None and used.running >= limit:
        waits.append((SOON, "requests", f"{used.running} requests run at once, of {limit} that may"))
    if (limit := limits.requests_per_minute) is not None:
        wait = _wait(limit - 1, used.requests, used.requests_before, passed)
        waits.append((wait, "requests", f"the limit is {limit} requests a minute"))
        requests_left = _quota(limit, used.requests, used.requests_before, passed, 0 if wait else 1)
    if (limit := limits.tokens_per_minute) is not None:
        asked = min(tokens, limit)
        room = limit - asked - used.reserved
        if room >= 0:
            wait = _wait(room, used.tokens, used.tokens_before, passed)
        else:  # what runs has to end first, and may have used less than was reserved
            wait = max(SOON, _wait(limit - asked, used.tokens, used.tokens_before, passed))
        said = f"the limit is {limit} tokens a minute, and this request may take {tokens}"
        waits.append((wait, "tokens", said))
        taken = used.reserved + (0 if wait else asked)
        tokens_left = _quota(limit, used.tokens, used.tokens_before, passed, taken)
    wait, kind, reason = max(waits, default=(0.0, "requests", ""), key=lambda each: each[0])
    return Decision(wait, kind, reason if wait else "", requests_left, tokens_left)


def as_of(meter: Meter, minute: int) -> Meter:
    """The meter as it stands in another minute than its own."""
    if meter.minute == minute:
        return meter
    requests, tokens = (meter.requests, meter.tokens) if meter.minute == minute - 1 else (0, 0)
    return replace(meter, minute=minute, requests=0, tokens=0, requests_before=requests, tokens_before=tokens)


def together(meters: Iterable[Meter], minute: int) -> Meter:
    """The sum of several gateways' meters."""
    total = Meter(minute)
    for meter in meters:
        now = as_of(meter, minute)
        total = Meter(
            minute,
            total.requests + now.requests,
            total.requests_before + now.requests_before,
            total.tokens + now.tokens,
            total.tokens_before + now.tokens_before,
            total.running + now.running,
            total.reserved + now.reserved,
        )
    return total


def duration(seconds: float) -> str:
    """Seconds as OpenAI's headers have them: "120ms", "1s", "7.5s", "6m0s"."""
    milliseconds = math.ceil(seconds * 1000)
    if 0 < milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(milliseconds, 60_000)
    return (f"{minutes}m" if minutes else "") + f"{rest / 1000:g}s"


def _wait(room: int, current: int, before: int, passed: float) -> float:
    """Seconds until this minute's count and what is left of the one before come down to `room`, which is >= 0."""
    if current <= room:
        fraction = (room - current) / before if before else 1.0
        return max(0.0, MINUTE * (1 - fraction) - passed)
    return MINUTE - passed + MINUTE * (1 - room / current)


def _quota(limit: int, current: int, before: int, passed: float, taken: int) -> Quota:
    left = limit - taken - current - before * (1 - passed / MINUTE)
    reset = 2 * MINUTE - passed if current + taken else MINUTE - passed if before else 0.0
    return Quota(limit, max(0, math.floor(left)), reset)
