"""A gateway's usage by tenant, and the rate windows of the other gateways as last read.

Only the event loop's thread uses it. `flush` writes it to the database, in batches.
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from loramill.errors import RateLimited
from loramill.registry.usage import UsageCount, UsageItem
from loramill.serve.api.limits.policy import MINUTE_SECONDS, LimitDecision, decide, merge_windows, roll_to_minute
from loramill.types import Limits, RateWindow

#: Seconds after which a gateway with running requests writes its windows even if they did not change.
_HEARTBEAT_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Permit:
    """Permission for one request to run, until it is released.

    Attributes:
        tenant: tenant of the request.
        metered: whether the tenant has limits.
        reserved: tokens that are reserved for the request.
        headers: headers of the response.
    """

    tenant: str
    metered: bool
    reserved: int
    headers: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class UsageBatch:
    """What is written by one flush: counts, which must be added exactly once, and the current rate windows."""

    number: int
    counts: Mapping[UsageItem, UsageCount]
    windows: Mapping[str, RateWindow]
    taken_at: float


class UsageTracker:
    """Usage and rate windows of one gateway.

    Attributes:
        gateway_id: ID of the gateway in the database.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self.gateway_id = f"gateway-{secrets.token_hex(8)}"
        self._clock = clock
        self._windows: dict[str, RateWindow] = {}
        self._peers: Mapping[str, Sequence[RateWindow]] = {}
        self._counts: dict[UsageItem, UsageCount] = {}
        self._unflushed: UsageBatch | None = None
        self._batch_number, self._flushed_at, self._changed = 0, 0.0, False

    def acquire(self, tenant: str, limits: Limits | None, tokens: int) -> Permit:
        """Admits a request of up to this number of tokens. Without limits it is not metered.

        Raises:
            RateLimited: a limit of the tenant is reached.
        """
        if limits is None or (limits.requests_per_minute, limits.tokens_per_minute, limits.concurrent_requests) == (
            None,
            None,
            None,
        ):
            return Permit(tenant, False, 0, {})
        now, mine = self._clock(), self._window(tenant)
        decision = decide(limits, merge_windows([mine, *self._peers.get(tenant, ())], mine.minute), tokens, now)
        if not decision.allowed:
            raise _rate_limited(tenant, decision)
        reserved = min(tokens, limits.tokens_per_minute or 0)
        self._set(
            tenant,
            replace(
                mine,
                requests=mine.requests + 1,
                running_requests=mine.running_requests + 1,
                reserved_tokens=mine.reserved_tokens + reserved,
            ),
        )
        return Permit(tenant, True, reserved, decision.headers)

    def release(self, permit: Permit, model: str, version: str | None, count: UsageCount) -> None:
        """Ends a request and adds its usage. A request that was rejected before it began has none."""
        if permit.metered:
            mine = self._window(permit.tenant)
            self._set(
                permit.tenant,
                replace(
                    mine,
                    tokens=mine.tokens + count.prompt_tokens + count.completion_tokens,
                    running_requests=mine.running_requests - 1,
                    reserved_tokens=mine.reserved_tokens - permit.reserved,
                ),
            )
        if count.requests:
            day = time.strftime("%Y-%m-%d", time.gmtime(self._clock()))
            item = UsageItem(permit.tenant, day, model, version or "")
            self._counts[item] = self._counts.get(item, UsageCount()) + count

    @property
    def has_new_counts(self) -> bool:
        """Whether the last batch was flushed, and there are counts for another."""
        return self._unflushed is None and bool(self._counts)

    def next_batch(self) -> UsageBatch | None:
        """What to write now; None: nothing. Counts that were not flushed yet are returned again, unchanged."""
        now = self._clock()
        if self.has_new_counts:
            self._batch_number += 1
            self._unflushed, self._counts = UsageBatch(self._batch_number, self._counts, {}, now), {}
        alive = (
            any(window.running_requests for window in self._windows.values())
            and now - self._flushed_at >= _HEARTBEAT_SECONDS
        )
        if self._unflushed is None and not self._changed and not alive:
            return None
        counts = self._unflushed.counts if self._unflushed else {}
        self._changed = False
        return UsageBatch(self._batch_number, counts, dict(self._windows), now)

    def mark_flushed(self, batch: UsageBatch) -> None:
        """Records that a batch is in the database."""
        self._unflushed, self._flushed_at = None, batch.taken_at
        minute = int(batch.taken_at // MINUTE_SECONDS)
        for tenant, window in batch.windows.items():
            if self._windows[tenant] == window and not window.running_requests and window.minute < minute - 1:
                del self._windows[tenant]

    def mark_failed(self) -> None:
        """Records that a batch may not be in the database."""
        self._changed = True

    def update_peers(self, peers: Mapping[str, Sequence[RateWindow]]) -> None:
        """Replaces the rate windows of the other gateways."""
        self._peers = peers

    def _window(self, tenant: str) -> RateWindow:
        minute = int(self._clock() // MINUTE_SECONDS)
        return roll_to_minute(self._windows.get(tenant, RateWindow(minute)), minute)

    def _set(self, tenant: str, window: RateWindow) -> None:
        self._windows[tenant], self._changed = window, True


def _rate_limited(tenant: str, decision: LimitDecision) -> RateLimited:
    seconds = max(decision.wait_seconds, 0.001)
    return RateLimited(
        f"Rate limit reached for '{tenant}': {decision.reason}. Try again in {math.ceil(seconds)} s.",
        kind=decision.kind,
        seconds=seconds,
        headers=decision.headers,
    )
