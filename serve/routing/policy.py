"""Which replica answers a request: one that holds its adapter, else the adapter's home, but none that is overloaded.

A pure function of reports and counts. An adapter's home is the replica with the highest hash of both (rendezvous
hashing), so a replica that goes away moves its own adapters and no others. A replica is overloaded when it has more
than its share of the requests; then the next one takes over its adapters, which is how a hot adapter spreads. Where
that costs another adapter its slot, the threshold is higher: a copy too many is loaded again and again.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

#: A replica's share of the requests: this many times the mean of the other replicas,
LOAD_FACTOR = 1.5
#: and this many requests more; twice as many where a load would cost another adapter its slot.
SLACK_REQUESTS = 12.0
#: Seconds after which a dispatched request is included in its replica's reports.
REPORT_LAG_SECONDS = 0.75


@dataclass(frozen=True, slots=True)
class ReplicaReport:
    """The last report of a replica; it may be about a second old.

    Attributes:
        replica: the replica's id.
        versions: adapters in its slots, including those being loaded.
        free_slots: adapters that it can load without evicting one.
        requests: running and waiting requests. Their number and not their tokens: the length of an answer is not known
            in advance, and its limit is a poor estimate.
    """

    replica: str
    versions: frozenset[str] = frozenset()
    free_slots: int = 0
    requests: int = 0

    @classmethod
    def from_stats(cls, replica: str, stats: Mapping[str, Any]) -> ReplicaReport:
        """Reads what `report_stats` wrote. Without a report, a replica is empty, and has no known free slots."""
        if not stats:
            return cls(replica)
        return cls(replica, frozenset(stats["versions"]), stats["free_slots"], stats["requests"])


def report_stats(versions: Iterable[str], *, slots: int, requests: int) -> dict[str, Any]:
    """A replica's report as plain values, for `ReplicaReport.from_stats`.

    Equal states give equal reports: Serve sends a report to the routers only if it has changed.
    """
    held = sorted(set(versions))
    return {"versions": held, "free_slots": max(0, slots - len(held)), "requests": requests}


@dataclass(frozen=True, slots=True)
class Candidate:
    """A replica from the point of view of one request: its report, and what was dispatched to it since.

    Attributes:
        load: requests that run, wait or are on their way.
        has_adapter: whether the request's adapter is in a slot, or will be for a dispatched request.
        free_slots: adapters that it can load without evicting one; negative if dispatched requests need more slots.
    """

    replica: str
    load: int
    has_adapter: bool = False
    free_slots: int = 0


class RecentDispatches:
    """What one router dispatched recently, and reports do not include yet.

    Args:
        lag_seconds: seconds after which reports include a dispatched request.
    """

    def __init__(self, lag_seconds: float = REPORT_LAG_SECONDS) -> None:
        self._lag_seconds = lag_seconds
        # In the order of time.
        self._dispatches: dict[str, tuple[float, str, str | None]] = {}
        self._by_replica: Counter[str] = Counter()
        self._by_version: dict[str, Counter[str]] = {}

    def record(self, request: str, replica: str, version: str | None, now: float) -> None:
        """Records that a request was dispatched to a replica; a second dispatch of it replaces the first."""
        self._remove(request)
        self._dispatches[request] = (now, replica, version)
        self._by_replica[replica] += 1
        if version is not None:
            self._by_version.setdefault(replica, Counter())[version] += 1

    def candidates(self, reports: Iterable[ReplicaReport], version: str | None, now: float) -> list[Candidate]:
        """The replicas for a request for `version` at `now`."""
        while self._dispatches and (oldest := next(iter(self._dispatches.items())))[1][0] <= now - self._lag_seconds:
            self._remove(oldest[0])
        return [self._candidate(report, version) for report in reports]

    def _candidate(self, report: ReplicaReport, version: str | None) -> Candidate:
        dispatched = self._by_version.get(report.replica, Counter[str]())
        return Candidate(
            report.replica,
            report.requests + self._by_replica[report.replica],
            version in report.versions or version in dispatched,
            report.free_slots - len(dispatched.keys() - report.versions),
        )

    def _remove(self, request: str) -> None:
        if request not in self._dispatches:
            return
        _, replica, version = self._dispatches.pop(request)
        _decrement(self._by_replica, replica)
        if version is not None:
            _decrement(self._by_version[replica], version)
            if not self._by_version[replica]:
                del self._by_version[replica]


def route(version: str | None, candidates: Sequence[Candidate]) -> tuple[str, ...]:
    """Orders the replicas for a request for `version` (None: the base), the best first.

    Replicas with the adapter come first; then those with a free slot, in the order of rendezvous hashing, the adapter's
    home first; then those that would evict another adapter. Overloaded replicas come last, the least loaded first. For
    the base, only the load counts.
    """
    if version is None:
        return tuple(c.replica for c in sorted(candidates, key=lambda c: (c.load, c.replica)))
    requests = sum(c.load for c in candidates)
    others = max(1, len(candidates) - 1)

    def is_overloaded(c: Candidate, slack: float) -> bool:
        return c.load >= LOAD_FACTOR * (requests - c.load) / others + slack

    # A copy that evicts another adapter is worth more waiting than one for which a slot is free.
    slot_is_free = any(c.free_slots > 0 and not is_overloaded(c, SLACK_REQUESTS) for c in candidates)
    holder_slack = SLACK_REQUESTS if slot_is_free else 2 * SLACK_REQUESTS

    def preference(c: Candidate) -> tuple[int, int, bytes, str]:
        if is_overloaded(c, holder_slack if c.has_adapter else SLACK_REQUESTS):
            return 3, c.load, b"", c.replica
        weight = _rendezvous_weight(version, c.replica)
        if c.has_adapter:
            return 0, c.load, weight, c.replica
        return (1 if c.free_slots > 0 else 2), 0, weight, c.replica

    return tuple(c.replica for c in sorted(candidates, key=preference))


def _rendezvous_weight(version: str, replica: str) -> bytes:
    """The weight of a replica for an adapter; the lowest is its home (Thaler and Ravishankar 1998, weights negated)."""
    return hashlib.blake2b(f"{version} {replica}".encode(), digest_size=8).digest()


def _decrement(counter: Counter[str], key: str) -> None:
    counter[key] -= 1
    if not counter[key]:
        del counter[key]
