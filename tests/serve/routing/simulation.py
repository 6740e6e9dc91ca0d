"""Simulated replicas and gateways: slots as in the engine, and gateways with old reports."""

from __future__ import annotations

import heapq
import random
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from loramill.serve.engine.adapters.residency import Residency
from loramill.serve.routing.policy import RecentDispatches, ReplicaReport, report_stats, route

TICK = 0.02
LOAD_SECONDS = 0.2
REPORT_SECONDS, REPORT_DELAY = 0.5, 0.2
#: Requests that a replica serves at full speed; more of them share it.
CAPACITY = 8
WORK_SECONDS = 0.8


@dataclass(frozen=True)
class Arrival:
    at: float
    version: str | None
    work: float = WORK_SECONDS


@dataclass(eq=False)
class Job:
    version: str | None
    left: float


class Replica:
    """An engine as the router sees it: slots that load and lose adapters, and requests that share its speed."""

    def __init__(self, name: str, slots: int) -> None:
        self.name = name
        self.loads: Counter[str] = Counter()
        self.waiting: list[Job] = []
        self.running: list[Job] = []
        self._slots = slots
        self._residency = Residency(slots, patience_steps=64)
        self._fetching: dict[str, float] = {}

    @property
    def requests(self) -> int:
        return len(self.waiting) + len(self.running)

    def submit(self, arrival: Arrival) -> None:
        self.waiting.append(Job(arrival.version, arrival.work))
        if arrival.version is not None:
            self._residency.acquire(arrival.version)

    def tick(self, now: float) -> None:
        for version in self._residency.advance().load:
            self.loads[version] += 1
            self._fetching[version] = now + LOAD_SECONDS
        for version in [version for version, until in self._fetching.items() if until <= now]:
            del self._fetching[version]
            self._residency.mark_loaded(version)
        started = [job for job in self.waiting if job.version is None or self._residency.ready(job.version)]
        self.waiting = [job for job in self.waiting if job not in started]
        self.running += started
        for job in started:
            if job.version is not None:
                self._residency.begin_use(job.version)
        for job in self.running:
            job.left -= TICK * min(1.0, CAPACITY / len(self.running))
        for job in [job for job in self.running if job.left <= 0]:
            self.running.remove(job)
            if job.version is not None:
                self._residency.end_use(job.version)
                self._residency.release(job.version)

    def report(self) -> ReplicaReport:
        held = (*self._residency.resident, *self._residency.loading)
        return ReplicaReport.from_stats(self.name, report_stats(held, slots=self._slots, requests=self.requests))


@dataclass
class Seen:
    """The outcome. `sent` is in order: time, version, replica."""

    loads: Counter[str] = field(default_factory=Counter)
    sent: list[tuple[float, str | None, str]] = field(default_factory=list)
    #: Requests at the busiest replica over the mean of all, each summed over time.
    imbalance: float = 0.0

    def replicas_of(self, version: str, since: float = 0.0) -> set[str]:
        return {replica for at, sent, replica in self.sent if sent == version and at >= since}


def play(
    names: Sequence[str],
    slots: int,
    arrivals: Iterable[Arrival],
    *,
    gateways: int = 2,
    dies: tuple[str, float] | None = None,
    seed: int = 0,
) -> Seen:
    """Routes all arrivals by gateways that share no state; `dies` is a replica and when it ends."""
    rng, seen = random.Random(seed), Seen()
    replicas = {name: Replica(name, slots) for name in names}
    routers = [RecentDispatches() for _ in range(gateways)]
    reports = [replica.report() for replica in replicas.values()]
    under_way: deque[tuple[float, list[ReplicaReport]]] = deque()
    coming = deque(enumerate(arrivals))
    now = next_report = busiest = mean = 0.0
    while coming or any(replica.requests for replica in replicas.values()):
        if dies and now >= dies[1] and replicas.pop(dies[0], None):
            reports = [report for report in reports if report.replica in replicas]
        if now >= next_report:
            under_way.append((now + REPORT_DELAY, [replica.report() for replica in replicas.values()]))
            next_report += REPORT_SECONDS
        if under_way and under_way[0][0] <= now:
            reports = [report for report in under_way.popleft()[1] if report.replica in replicas]
        while coming and coming[0][1].at <= now:
            number, arrival = coming.popleft()
            router = rng.choice(routers)
            to = route(arrival.version, router.candidates(reports, arrival.version, now))[0]
            router.record(str(number), to, arrival.version, now)
            replicas[to].submit(arrival)
            seen.sent.append((now, arrival.version, to))
        for replica in replicas.values():
            replica.tick(now)
        if coming:
            busiest += max(replica.requests for replica in replicas.values())
            mean += sum(replica.requests for replica in replicas.values()) / len(replicas)
        now += TICK
    seen.loads = sum((replica.loads for replica in replicas.values()), Counter())
    seen.imbalance = busiest / mean
    return seen


def zipf(
    seed: int, replicas: int, versions: int, count: int, *, busy: float = 0.6, power: float = 1.0
) -> list[Arrival]:
    """Requests that arrive at random, for versions by Zipf's law, and keep the replicas busy for a part of the time."""
    rng = random.Random(seed)
    names = [f"v{number}" for number in range(versions)]
    rng.shuffle(names)
    rate = busy * replicas * CAPACITY / WORK_SECONDS
    times = accumulate(rng.expovariate(rate) for _ in range(count))
    requested = rng.choices(names, [1 / (rank + 1) ** power for rank in range(versions)], k=count)
    return [Arrival(at, name, rng.expovariate(1 / WORK_SECONDS)) for at, name in zip(times, requested, strict=True)]


def clairvoyant(requested: Sequence[str], slots: int) -> int:
    """Loads of one replica with all the slots that knows all future requests: Belady's, the minimum when
    requests are served in the order in which they come."""
    following: list[float] = [float("inf")] * len(requested)
    last: dict[str, int] = {}
    for index in range(len(requested) - 1, -1, -1):
        following[index] = last.get(requested[index], float("inf"))
        last[requested[index]] = index
    held: dict[str, float] = {}
    farthest: list[tuple[float, str]] = []
    loads = 0
    for index, version in enumerate(requested):
        if version not in held:
            loads += 1
            while len(held) >= slots:
                next_use, name = heapq.heappop(farthest)
                if held.get(name) == -next_use:
                    del held[name]
        held[version] = following[index]
        heapq.heappush(farthest, (-following[index], version))
    return loads


def informed(requested: Sequence[str], slots: int) -> int:
    """Loads of one replica with all the slots that knows how popular each version is, but not the future: it evicts
    the least popular. No policy without the future loads less on average if each request is drawn independently
    (Aho, Denning and Ullman 1971)."""
    ranks = {version: rank for rank, (version, _) in enumerate(Counter(requested).most_common())}
    held: set[str] = set()
    loads = 0
    for version in requested:
        if version not in held:
            loads += 1
            if len(held) >= slots:
                held.remove(max(held, key=ranks.__getitem__))
            held.add(version)
    return loads
