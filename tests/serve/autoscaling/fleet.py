"""A simulated fleet of replicas under the autoscaling policy, and traces of requests for it."""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from loramill.serve.autoscaling.policy import ReplicaLoad, ReplicaSet, ScalingDecision, ScalingTargets, decide

TICK = 0.25
#: Seconds that a new replica takes to start, and the age in seconds of a replica's reports.
START, STALE = 10.0, 1.0
#: Tokens per second of a full replica; with n running answers it reaches n / (n + 4) of that.
SPEED, HALF = 400.0, 4
SEQUENCES = 16
#: An answer's token costs as much as this number of prompt tokens.
PREFILL = 8
WINDOW = 10.0


@dataclass(frozen=True)
class Request:
    at: float
    prompt: int
    answer: int


@dataclass(eq=False)
class Answer:
    request: Request
    left: float


@dataclass(eq=False)
class Engine:
    """A replica that computes its answers in parallel, up to its number of sequences."""

    answers: list[Answer] = field(default_factory=list)
    firsts: deque[tuple[float, float]] = field(default_factory=deque)
    computed: deque[tuple[float, float]] = field(default_factory=deque)
    reports: deque[tuple[float, ReplicaLoad]] = field(default_factory=deque)
    draining: bool = False

    def tick(self, now: float) -> list[float]:
        """Returns the seconds to the first token of the answers that have begun."""
        running = self.answers[:SEQUENCES]
        step = TICK * SPEED / (len(running) + HALF)
        first, tokens = [], 0.0
        for answer in running:
            before = answer.left
            answer.left -= (
                min(step * PREFILL, before - answer.request.answer) if before > answer.request.answer else step
            )
            tokens += before - answer.left
            if before >= answer.request.answer > answer.left:
                first.append(now - answer.request.at)
        self.answers = [answer for answer in self.answers if answer.left > 0]
        self.firsts += [(now, seconds) for seconds in first]
        self.computed.append((now, tokens))
        for recent in (self.firsts, self.computed):
            while recent and recent[0][0] <= now - WINDOW:
                recent.popleft()
        seconds = sorted(each for _, each in self.firsts)
        load = ReplicaLoad(
            pending_tokens=sum(answer.left for answer in self.answers),
            tokens_per_second=sum(tokens for _, tokens in self.computed) / WINDOW,
            first_token_seconds=seconds[len(seconds) // 2] if seconds else 0.0,
            running=len(running),
            waiting=len(self.answers) - len(running),
        )
        self.reports.append((now, load))
        while len(self.reports) > 1 and self.reports[1][0] <= now - STALE:
            self.reports.popleft()
        return first


@dataclass
class Seen:
    """The outcome: decisions that changed the target, seconds to first tokens and when each came, replica seconds."""

    changes: list[tuple[float, ScalingDecision]] = field(default_factory=list)
    firsts: list[float] = field(default_factory=list)
    at: list[float] = field(default_factory=list)
    replica_seconds: float = 0.0
    most: int = 0

    def late(self, quantile: float) -> float:
        """Seconds to the first token, at a quantile of the requests."""
        return sorted(self.firsts)[int(quantile * (len(self.firsts) - 1))]

    @property
    def turns(self) -> int:
        """How often the number of replicas changed direction."""
        counts = [decision.replicas for _, decision in self.changes]
        ways = [after > before for before, after in pairwise(counts)]
        return sum(a != b for a, b in pairwise(ways))


def play(requests: Sequence[Request], targets: ScalingTargets, *, least: int, most: int, seconds: float) -> Seen:
    """Simulates a trace, from `least` replicas on."""
    seen, previous, target = Seen(), None, least
    engines = [Engine() for _ in range(least)]
    starting: list[float] = []
    coming, queue = deque(requests), deque[Request]()
    for now in (tick * TICK for tick in range(int(seconds / TICK))):
        engines += [Engine() for ready in starting if ready <= now]
        starting = [ready for ready in starting if ready > now]
        while coming and coming[0].at <= now:
            queue.append(coming.popleft())
        live = [engine for engine in engines if not engine.draining]
        while queue and live:
            request = queue.popleft()
            min(live, key=lambda engine: len(engine.answers)).answers.append(
                Answer(request, request.prompt + request.answer)
            )
        for engine in engines:
            seen.firsts += engine.tick(now)
        seen.at += [now] * (len(seen.firsts) - len(seen.at))
        engines = [engine for engine in engines if engine.answers or not engine.draining]
        loads = tuple(engine.reports[0][1] for engine in live)
        decision = decide(ReplicaSet(now, target, loads, len(queue), least, most), previous, targets)
        previous = decision.state
        if decision.replicas != target:
            seen.changes.append((now, decision))
            starting += [now + START] * (decision.replicas - target)
            for _ in range(target - decision.replicas):
                if starting:
                    starting.pop()
                else:
                    live.pop(live.index(min(live, key=lambda engine: len(engine.answers)))).draining = True
            target = decision.replicas
        seen.replica_seconds += TICK * (len(engines) + len(starting))
        seen.most = max(seen.most, target)
    return seen


def trace(seed: int, seconds: float, rate: Callable[[float], float]) -> list[Request]:
    """Requests that arrive at random, `rate` per second at each time; prompts and answers are as long as in a chat."""
    rng, now, requests = random.Random(seed), 0.0, []
    highest = max(rate(at) for at in range(int(seconds)))
    while (now := now + rng.expovariate(highest)) < seconds:
        if rng.random() * highest < rate(now):
            requests.append(Request(now, rng.randint(20, 200), rng.randint(20, 160)))
    return requests


def oracle(requests: Sequence[Request], least: int, seconds: float, minute: float = 60.0) -> float:
    """Replica seconds if each minute's work is known in advance and replicas are four fifths utilized."""
    tokens = [0.0] * math.ceil(seconds / minute)
    for request in requests:
        tokens[int(request.at / minute)] += request.prompt / PREFILL + request.answer
    return sum(max(least, math.ceil(each / minute / (0.8 * SPEED))) * minute for each in tokens)
