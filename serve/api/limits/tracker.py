"""A gateway's books: what its tenants use, exactly, and what the record last said of the other gateways.

Only the event loop's thread touches them. What has to be written is a `Page`; `metering` writes it.
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from loramill.errors import RateLimited
from loramill.registry.usage import Count, Item
from loramill.serve.api.limits.policy import MINUTE, Decision, as_of, decide, together
from loramill.types import Limits, Meter

#: Seconds after which a gateway on which something runs says that it lives, though nothing changed.
_SIGN_OF_LIFE = 2.0


@dataclass(frozen=True, slots=True)
class Permit:
    """Leave for one request to run, to be given back at its end. `reserved` tokens are kept for it, if it is metered.

    Attributes:
        headers: of its answer.
    """

    tenant: str
    metered: bool
    reserved: int
    headers: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Page:
    """What is to be written: counts, which must be added once, and meters as they stand."""

    number: int
    counts: Mapping[Item, Count]
    meters: Mapping[str, Meter]
    now: float


class Books:
    """What one gateway counts.

    Attributes:
        gateway: its id in the record.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self.gateway = f"gateway-{secrets.token_hex(8)}"
        self._clock = clock
        self._meters: dict[str, Meter] = {}
        self._others: Mapping[str, Sequence[Meter]] = {}
        self._counts: dict[Item, Count] = {}
        self._page: Page | None = None
        self._pages, self._written_at, self._changed = 0, 0.0, False

    def enter(self, tenant: str, limits: Limits | None, tokens: int) -> Permit:
        """Lets a request that may come to so many tokens begin; without limits it isn't metered.

        Raises:
            RateLimited: a limit of the tenant's is reached.
        """
        if limits is None or (limits.requests_per_minute, limits.tokens_per_minute, limits.concurrent_requests) == (
            None,
            None,
            None,
        ):
            return Permit(tenant, False, 0, {})
        now, mine = self._clock(), self._meter(tenant)
        decision = decide(limits, together([mine, *self._others.get(tenant, ())], mine.minute), tokens, now)
        if not decision.allowed:
            raise _limited(tenant, decision)
        reserved = min(tokens, limits.tokens_per_minute or 0)
        self._set(
            tenant,
            replace(mine, requests=mine.requests + 1, running=mine.running + 1, reserved=mine.reserved + reserved),
        )
        return Permit(tenant, True, reserved, decision.headers)

    def leave(self, permit: Permit, model: str, version: str | None, count: Count) -> None:
        """Ends a request of which `count` came; nothing is counted for one that was refused before it began."""
        if permit.metered:
            mine = self._meter(permit.tenant)
            self._set(
                permit.tenant,
                replace(
                    mine,
                    tokens=mine.tokens + count.prompt_tokens + count.completion_tokens,
                    running=mine.running - 1,
                    reserved=mine.reserved - permit.reserved,
                ),
            )
        if count.requests:
            day = time.strftime("%Y-%m-%d", time.gmtime(self._clock()))
            item = Item(permit.tenant, day, model, version or "")
            self._counts[item] = self._counts.get(item, Count()) + count

    def page(self) -> Page | None:
        """What has to be written now, None if nothing: a page that wasn't written yet comes again, as it was."""
        now = self._clock()
        if self._page is None and self._counts:
            self._pages += 1
            self._page, self._counts = Page(self._pages, self._counts, {}, now), {}
        alive = any(meter.running for meter in self._meters.values()) and now - self._written_at >= _SIGN_OF_LIFE
        if self._page is None and not self._changed and not alive:
            return None
        counts = self._page.counts if self._page else {}
        self._changed = False
        return Page(self._pages, counts, dict(self._meters), now)

    def written(self, page: Page) -> None:
        """Takes note that a page is in the record."""
        self._page, self._written_at = None, page.now
        minute = int(page.now // MINUTE)
        for tenant, meter in page.meters.items():
            if self._meters[tenant] == meter and not meter.running and meter.minute < minute - 1:
                del self._meters[tenant]

    def unwritten(self) -> None:
        """Takes note that a page may not be in the record."""
        self._changed = True

    def hear(self, others: Mapping[str, Sequence[Meter]]) -> None:
        """Takes note of what the other gateways have seen."""
        self._others = others

    def _meter(self, tenant: str) -> Meter:
        minute = int(self._clock() // MINUTE)
        return as_of(self._meters.get(tenant, Meter(minute)), minute)

    def _set(self, tenant: str, meter: Meter) -> None:
        self._meters[tenant], self._changed = meter, True


def _limited(tenant: str, decision: Decision) -> RateLimited:
    seconds = max(decision.wait, 0.001)
    return RateLimited(
        f"Rate limit reached for '{tenant}': {decision.reason}. Try again in {math.ceil(seconds)} s.",
        kind=decision.kind,
        seconds=seconds,
        headers=decision.headers,
    )
