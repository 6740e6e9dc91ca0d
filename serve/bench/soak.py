"""A long run of whatever may come: `loramill bench soak`. Nothing may grow, and nobody may be forgotten."""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from loramill.bases import Base
from loramill.errors import DeadlineExceeded, EngineFault, ModelNotFound, Overloaded
from loramill.serve.bench.subject import Subject, write_adapters
from loramill.serve.engine import Engine, EngineConfig, Finish, Output, Request, Sampling
from loramill.serve.model import load_decoder

#: Few slots, blocks and waiting places, so that all of them run out.
CONFIG = EngineConfig(
    max_sequences=24,
    kv_tokens=6144,
    adapter_slots=12,
    adapter_bytes=120 << 20,
    host_bytes=100 << 20,
    rank_budget=160,
    max_waiting=64,
    patience=16,
)
_FOLDERS, _VERSIONS, _TENANTS = 8, 64, 5
#: Of the run, after which memory must not grow any more: caches fill first.
_WARM = 0.4


@dataclass
class Report:
    """What a soak came to.

    Attributes:
        ends: answers by how they ended.
        early, late: bytes resident, the most in the time after the caches had filled and in the last third.
        seconds: that it took.
    """

    ends: Counter[str] = field(default_factory=Counter)
    early: int = 0
    late: int = 0
    seconds: float = 0.0
    steps: int = 0

    @property
    def growth(self) -> float:
        """By what share of itself memory grew."""
        return self.late / self.early - 1 if self.early else 0.0


def soak(base: Base, seconds: float, report: Callable[[str], object], *, seed: int = 0) -> Report:
    """Serves random requests for so long, cancels some, lets loads fail, and checks the books as it goes.

    Raises:
        EngineFault: the books don't add up, an answer came twice or after its end, or none came.
    """
    with tempfile.TemporaryDirectory(prefix="loramill-soak-") as scratch:
        decoder = load_decoder(base.folder, dtype=torch.bfloat16, threads=1)
        subject = Subject(base, decoder, write_adapters(decoder, Path(scratch), _FOLDERS))
        rng = random.Random(seed)

        def source(version: str) -> Path:
            if random.random() < 0.02:
                raise ModelNotFound("not today")
            return subject.source(version)

        engine = Engine(decoder, source, CONFIG)
        try:
            return _Run(engine, subject, rng, report).run(seconds)
        finally:
            engine.close()


class _Run:
    def __init__(self, engine: Engine, subject: Subject, rng: random.Random, report: Callable[[str], object]) -> None:
        self._engine = engine
        self._subject = subject
        self._rng = rng
        self._tell = report
        self._open: dict[tuple[str, int], Request] = {}
        self._count = 0
        self._report = Report()

    def run(self, seconds: float) -> Report:
        began = said = time.monotonic()
        while (now := time.monotonic()) < began + seconds or self._open:
            if now < began + seconds:
                self._disturb()
            if self._engine.wait(20):
                self._take(self._engine.step())
            elif self._open:
                raise EngineFault(f"{len(self._open)} answers are open, and nothing happens.")
            self._report.steps += 1
            if self._report.steps % 16 == 0:
                self._engine.check_integrity()
                self._weigh((now - began) / seconds)
            if now > said + 10:
                said = now
                self._tell(f"{now - began:.0f} s: {dict(self._report.ends)}, {_resident() >> 20} MiB")
        self._engine.check_integrity()
        stats = self._engine.stats
        if (stats.waiting, stats.running, stats.free_blocks) != (0, 0, stats.blocks):
            raise EngineFault(f"Nobody is left, and yet: {stats}.")
        self._report.seconds = time.monotonic() - began
        return self._report

    def _disturb(self) -> None:
        rng = self._rng
        while rng.random() < 0.5:
            request = self._request()
            try:
                self._engine.submit(request)
            except Overloaded:
                self._report.ends["refused"] += 1
                break
            self._open |= {(request.id, index): request for index in range(request.sampling.n)}
        if self._open and rng.random() < 0.1:
            self._engine.cancel(rng.choice(list(self._open))[0])

    def _request(self) -> Request:
        rng = self._rng
        self._count += 1
        weights = [1 / place for place in range(1, _VERSIONS + 1)]
        version = rng.choice([None, *rng.choices([str(v) for v in range(_VERSIONS)], weights, k=4)])
        # Some begin alike.
        start = [7] * rng.choice([0, 0, 64, 200])
        tokens = start + [rng.randrange(self._subject.decoder.vocabulary) for _ in range(rng.randint(1, 200))]
        sampling = Sampling(
            max_tokens=rng.randint(1, 60),
            temperature=rng.choice([0.0, 0.0, 1.0]),
            top_p=rng.choice([1.0, 0.9]),
            frequency_penalty=rng.choice([0.0, 0.0, 0.5]),
            n=rng.choice([1, 1, 1, 3]),
            logprobs=rng.choice([None, None, 3]),
            echo=rng.random() < 0.05,
            seed=rng.randrange(100),
        )
        timeout = rng.choice([None, None, None, 0.5])
        tenant = f"tenant {min(rng.randrange(_TENANTS), rng.randrange(_TENANTS))}"
        return Request(str(self._count), tenant, tuple(tokens), sampling, version, rng.choice([0, 0, 0, 1]), timeout)

    def _take(self, outputs: list[Output]) -> None:
        for output in outputs:
            key = (output.request, output.index)
            if key not in self._open:
                raise EngineFault(f"An output for answer {key}, which isn't open.")
            if output.finish is None:
                continue
            del self._open[key]
            known = output.error is None or isinstance(output.error, (DeadlineExceeded, ModelNotFound))
            if not known:
                raise EngineFault(f"Answer {key} ended with {output.error!r}.")
            self._report.ends[type(output.error).__name__ if output.finish == Finish.ERROR else output.finish] += 1

    def _weigh(self, passed: float) -> None:
        if _WARM < passed < _WARM + 0.2:
            self._report.early = max(self._report.early, _resident())
        elif passed > 0.8:
            self._report.late = max(self._report.late, _resident())


def _resident() -> int:
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGESIZE") if statm.exists() else 0
