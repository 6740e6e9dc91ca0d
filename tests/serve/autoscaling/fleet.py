"""A fleet of replicas played out in time under the autoscaling policy, and the traces it is tried on."""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from loramill.serve.autoscaling.policy import ReplicaLoad, ReplicaSet, ScalingDecision, ScalingTargets, decide

TICK = 0.25
#: Seconds after which a replica that was asked for is up, and by which what is known of a replica is old.
START, STALE = 10.0, 1.0
#: Tokens a second of a full replica. With n answers under way it reaches n / (n + 4) of that.
SPEED, HALF = 400.0, 4
SEQUENCES = 16
#: A prompt's token costs so much less than an answer's.
PREFILL = 8
WINDOW = 10.0


@dataclass(frozen=True)
class Ask:
    at: float
    prompt: int
    answer: int


@dataclass(eq=False)
class Answer:
    ask: Ask
    left: float


@dataclass(eq=False)
class Engine:
    """A replica that computes its answers in parallel, up to its number of sequences."""

    answers: list[Answer] = field(default_factory=list)
    firsts: deque[tuple[float, float]] = field(default_factory=deque)
    computed: deque[tuple[float, float]] = field(default_factory=deque)
    told: deque[tuple[float, ReplicaLoad]] = field(default_factory=deque)
    draining: bool = False

    def tick(self, now: float) -> list[float]:
        """Returns the seconds to the first token of the answers that have begun."""
        running = self.answers[:SEQUENCES]
        step = TICK * SPEED / (len(running) + HALF)
        first, tokens = [], 0.0
        for answer in running:
            before = answer.left
            answer.left -= min(step * PREFILL, before - answer.ask.answer) if before > answer.ask.answer else step
            tokens += before - answer.left
            if before >= answer.ask.answer > answer.left:
                first.append(now - answer.ask.at)
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
        self.told.append((now, load))
        while len(self.told) > 1 and self.told[1][0] <= now - STALE:
            self.told.popleft()
        return first


@dataclass
class Seen:
    """What came of it: each decision that changed something, seconds to first tokens and when each of them came, and
    replicas' seconds."""

    changes: list[tuple[float, ScalingDecision]] = field(default_factory=list)
    firsts: list[float] = field(default_factory=list)
    at: list[float] = field(default_factory=list)
    replica_seconds: float = 0.0
    most: int = 0

    def late(self, share: float) -> float:
        """Seconds within which this share of the first tokens came."""
        return sorted(self.firsts)[int(share * (len(self.firsts) - 1))]

    @property
    def turns(self) -> int:
        """How often the number of replicas went the other way than the time before."""
        counts = [decision.replicas for _, decision in self.changes]
        ways = [after > before for before, after in pairwise(counts)]
        return sum(a != b for a, b in pairwise(ways))


def play(asks: Sequence[Ask], targets: ScalingTargets, *, least: int, most: int, seconds: float) -> Seen:
    """Plays a trace; the replicas begin at `least`."""
    seen, memory, wanted = Seen(), None, least
    engines = [Engine() for _ in range(least)]
    starting: list[float] = []
    coming, queue = deque(asks), deque[Ask]()
    for now in (tick * TICK for tick in range(int(seconds / TICK))):
        engines += [Engine() for ready in starting if ready <= now]
        starting = [ready for ready in starting if ready > now]
        while coming and coming[0].at <= now:
            queue.append(coming.popleft())
        live = [engine for engine in engines if not engine.draining]
        while queue and live:
            ask = queue.popleft()
            min(live, key=lambda engine: len(engine.answers)).answers.append(Answer(ask, ask.prompt + ask.answer))
        for engine in engines:
            seen.firsts += engine.tick(now)
        seen.at += [now] * (len(seen.firsts) - len(seen.at))
        engines = [engine for engine in engines if engine.answers or not engine.draining]
        loads = tuple(engine.told[0][1] for engine in live)
        decision = decide(ReplicaSet(now, wanted, loads, len(queue), least, most), memory, targets)
        memory = decision.state
        if decision.replicas != wanted:
            seen.changes.append((now, decision))
            starting += [now + START] * (decision.replicas - wanted)
            for _ in range(wanted - decision.replicas):
                if starting:
                    starting.pop()
                else:
                    live.pop(live.index(min(live, key=lambda engine: len(engine.answers)))).draining = True
            wanted = decision.replicas
        seen.replica_seconds += TICK * (len(engines) + len(starting))
        seen.most = max(seen.most, wanted)
    return seen


def trace(seed: int, seconds: float, rate: Callable[[float], float]) -> list[Ask]:
    """Requests that come by chance, `rate` a second at each time; prompts and answers of a chat's lengths."""
    rng, now, asks = random.Random(seed), 0.0, []
    highest = max(rate(at) for at in range(int(seconds)))
    while (now := now + rng.expovariate(highest)) < seconds:
        if rng.random() * highest < rate(now):
            asks.append(Ask(now, rng.randint(20, 200), rng.randint(20, 160)))
    return asks


def oracle(asks: Sequence[Ask], least: int, seconds: float, minute: float = 60.0) -> float:
    """Replica seconds if each minute's work is known in advance and replicas are used to four fifths."""
    tokens = [0.0] * math.ceil(seconds / minute)
    for ask in asks:
        tokens[int(ask.at / minute)] += ask.prompt / PREFILL + ask.answer
    return sum(max(least, math.ceil(each / minute / (0.8 * SPEED))) * minute for each in tokens)
