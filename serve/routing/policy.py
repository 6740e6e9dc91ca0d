"""Which replica answers a request: one that holds its adapter, else its home, and none that is busier than its share.

Pure Python over reports and counts. An adapter's home is the live replica with the highest hash of both (rendezvous
hashing), so a replica that goes moves its own adapters and no others. A replica is crowded when it has more than its
share of the requests; then the next one takes over what it holds, which is how a hot adapter spreads. Where that
costs another adapter its slot, crowded means more: a copy too many is loaded again and again.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class RoutingLimits:
    """What counts as crowded, and as lately.

    Attributes:
        factor: a replica's share is so many times the mean of the others,
        slack: and so many requests more. Where a load would cost another adapter its slot, twice as many.
        lag: seconds after which a request that was sent is in the replica's reports.
    """

    load_factor: float = 1.5
    slack_requests: float = 12.0
    report_lag_seconds: float = 0.75


@dataclass(frozen=True, slots=True)
class ReplicaReport:
    """What a replica last said of itself; it may be about a second old.

    Attributes:
        replica: its id.
        versions: adapters in its slots, those being loaded included.
        room: adapters that it can take in without losing one.
        requests: that run or wait there. Their number and not their tokens: how long an answer gets is not known
            before, and what it may have at most says little.
        draining: it takes nothing new.
    """

    replica: str
    versions: frozenset[str] = frozenset()
    free_slots: int = 0
    requests: int = 0
    draining: bool = False

    @classmethod
    def from_stats(cls, replica: str, stats: Mapping[str, Any]) -> ReplicaReport:
        """Reads what `stats_of` wrote; a replica that has said nothing yet is empty, and has no room that is known."""
        if not stats:
            return cls(replica)
        return cls(replica, frozenset(stats["versions"]), stats["room"], stats["requests"], stats["draining"])


def report_stats(versions: Iterable[str], *, slots: int, requests: int, draining: bool = False) -> dict[str, Any]:
    """What a replica says of itself, as plain values for `Report.of`.

    The same is said in the same way: Serve tells the routers only of what has changed.
    """
    held = sorted(set(versions))
    return {"versions": held, "room": max(0, slots - len(held)), "requests": requests, "draining": draining}


@dataclass(frozen=True, slots=True)
class Candidate:
    """A replica as one request sees it: its report, and what was sent there since."""

    replica: str
    load: int
    has_adapter: bool = False
    free_slots: int = 0
    draining: bool = False


class RecentDispatches:
    """What one router has sent lately: reports don't tell of it yet."""

    def __init__(self, lag_seconds: float) -> None:
        self._lag_seconds = lag_seconds
        # In the order of time.
        self._dispatches: dict[str, tuple[float, str, str | None]] = {}
        self._by_replica: Counter[str] = Counter()
        self._by_version: dict[str, Counter[str]] = {}

    def record(self, request: str, replica: str, version: str | None, now: float) -> None:
        """A request goes to a replica; one that is sent again, to another perhaps, counts there alone."""
        self._remove(request)
        self._dispatches[request] = (now, replica, version)
        self._by_replica[replica] += 1
        if version is not None:
            self._by_version.setdefault(replica, Counter())[version] += 1

    def candidates(self, reports: Iterable[ReplicaReport], version: str | None, now: float) -> list[Candidate]:
        """The replicas as a request for `version` sees them now."""
        while self._dispatches and (oldest := next(iter(self._dispatches.items())))[1][0] <= now - self._lag_seconds:
            self._remove(oldest[0])
        return [self._candidate(report, version) for report in reports]

    def _candidate(self, report: ReplicaReport, version: str | None) -> Candidate:
        sent = self._by_version.get(report.replica, Counter[str]())
        return Candidate(
            report.replica,
            report.requests + self._by_replica[report.replica],
            version in report.versions or version in sent,
            report.free_slots - len(sent.keys() - report.versions),
            report.draining,
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


def route(version: str | None, candidates: Iterable[Candidate], limits: RoutingLimits) -> tuple[str, ...]:
    """The replicas that may answer a request for `version` (None: the base), the best first.

    Those that hold it come first, the least loaded before others; then those that have room for it, from its home on;
    then those where it would push another out. Crowded ones come last, and the base has no preference but the load.
    """
    live = [candidate for candidate in candidates if not candidate.draining]
    if not live:
        return ()
    if version is None:
        return tuple(c.replica for c in sorted(live, key=lambda c: (c.load, c.replica)))
    total, others = sum(c.load for c in live), max(1, len(live) - 1)

    def crowded(c: Candidate, slack: float) -> bool:
        return c.load >= limits.load_factor * (total - c.load) / others + slack

    cramped = not any(c.free_slots > 0 and not crowded(c, limits.slack_requests) for c in live)
    patience = 2 * limits.slack_requests if cramped else limits.slack_requests

    def preference(c: Candidate) -> tuple[int, int, bytes]:
        if crowded(c, patience if c.has_adapter else limits.slack_requests):
            return 3, c.load, b""
        if c.has_adapter:
            return 0, c.load, _rendezvous_weight(version, c.replica)
        return (1 if c.free_slots > 0 else 2), 0, _rendezvous_weight(version, c.replica)

    return tuple(c.replica for c in sorted(live, key=lambda c: (*preference(c), c.replica)))


def _rendezvous_weight(version: str, replica: str) -> bytes:
    """Of an adapter from a replica; the least is its home (Thaler and Ravishankar 1998, the weights negated)."""
    return hashlib.blake2b(f"{version} {replica}".encode(), digest_size=8).digest()


def _decrement(counter: Counter[str], key: str) -> None:
    counter[key] -= 1
    if not counter[key]:
        del counter[key]
