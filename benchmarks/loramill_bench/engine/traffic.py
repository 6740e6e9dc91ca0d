"""The traffic of a soak: random requests in waves, adapters that don't always come, and little room for all of it."""

from __future__ import annotations

import itertools
import json
import logging
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from safetensors.torch import load_file, save_file

from loramill.errors import ModelNotFound, Overloaded
from loramill.kernels import backend
from loramill.serve.engine import AdapterSource, Engine, EngineConfig, Request, SamplingParams
from loramill_bench.engine.ledger import Canary, Ledger
from loramill_bench.engine.subject import RANK, Subject, weights_file

_VERSIONS, _TENANTS = 64, 5
#: Open answers that clients strive for in a wave: from a machine that mostly idles to one that must refuse.
_CROWDS = (24, 1, 120, 4)


class Draw:
    """Random requests. No two have the same id."""

    def __init__(self, rng: random.Random, vocabulary: int) -> None:
        self.rng = rng
        self._vocabulary = vocabulary
        self._ids = itertools.count()

    def request(self) -> Request:
        """Short and long ones, for all versions and tenants, with all that can be asked for."""
        rng = self.rng
        # Some begin alike.
        start = [7] * rng.choice([0, 0, 64, 200])
        tokens = start + [rng.randrange(self._vocabulary) for _ in range(rng.randint(1, 200))]
        places = range(1, _VERSIONS + 1)
        (place,) = rng.choices(places, [1 / place for place in places])
        request = Request("", "", tuple(tokens), self._sampling(), rng.choice([None, *[str(place)] * 4]))
        return self.again(request)

    def again(self, request: Request) -> Request:
        """The same by another client, who may be in a hurry."""
        rng = self.rng
        return replace(
            request,
            id=str(next(self._ids)),
            tenant=f"tenant {min(rng.randrange(_TENANTS), rng.randrange(_TENANTS))}",
            priority=rng.choice([0, 0, 0, 1]),
            timeout_seconds=rng.choice([None, None, None, 10 ** rng.uniform(-2, 1)]),
        )

    def _sampling(self) -> SamplingParams:
        rng = self.rng
        echo = rng.random() < 0.1
        max_tokens = 0 if echo and rng.random() < 0.2 else rng.randint(1, 60)
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=rng.choice([0.0, 0.0, 0.7, 1.0]),
            top_p=rng.choice([1.0, 0.9]),
            top_k=rng.choice([0, 0, 40]),
            min_p=rng.choice([0.0, 0.0, 0.05]),
            repetition_penalty=rng.choice([1.0, 1.0, 1.2]),
            presence_penalty=rng.choice([0.0, 0.0, 0.5]),
            frequency_penalty=rng.choice([0.0, 0.0, 0.5]),
            logit_bias=((rng.randrange(self._vocabulary), 5.0),) if rng.random() < 0.1 else (),
            seed=rng.randrange(100),
            stop_ids=tuple(rng.sample(range(self._vocabulary), self._vocabulary // 20)) if rng.random() < 0.2 else (),
            min_tokens=rng.randint(0, max_tokens) if rng.random() < 0.3 else 0,
            n=rng.choice([1, 1, 1, 3]),
            logprobs=rng.choice([None, None, 0, 3]),
            echo=echo,
        )


def thin(folder: Path, rank: int) -> None:
    """Leaves so many ranks of an adapter: then now slots and now bytes run out."""
    file, settings = weights_file(folder), folder / "adapter_config.json"
    weights = {
        name: (whole[:rank] if ".lora_A." in name else whole[:, :rank]).contiguous()
        for name, whole in load_file(file).items()
    }
    save_file(weights, file)
    settings.write_text(json.dumps({**json.loads(settings.read_text(encoding="utf-8")), "r": rank}), encoding="utf-8")


def scarce_config(subject: Subject) -> EngineConfig:
    """Little of everything, so that all of it runs out."""
    adapter = weights_file(subject.adapters[0]).stat().st_size
    return EngineConfig(
        max_sequences=24,
        kv_tokens=3072,
        adapter_slots=10,
        adapter_bytes=7 * adapter,
        host_bytes=5 * adapter,
        rank_budget=6 * RANK,
        max_waiting=64,
        slot_patience_steps=16,
    )


def unreliable(source: AdapterSource, seed: int) -> AdapterSource:
    """Takes its time now and then, and fails in known and unknown ways."""
    rng = random.Random(seed)

    def find(version: str) -> Path:
        luck = rng.random()
        if luck < 0.02:
            raise ModelNotFound(f"Version {version} is gone for now.")
        if luck < 0.04:
            raise OSError("the disk hiccups")
        if luck < 0.2:
            time.sleep(0.2 * rng.random())
        return source(version)

    return find


@contextmanager
def no_log_of_loads() -> Iterator[None]:
    """They fail on purpose; what else the engine has to say is heard."""
    loader = logging.getLogger("loramill.serve.engine.adapters.loader")
    loader.addFilter(_nothing)
    try:
        yield
    finally:
        loader.removeFilter(_nothing)


def _nothing(record: logging.LogRecord) -> bool:
    return False


class Clients:
    """Who submits and cancels, in a thread of their own: at any moment, whatever the engine does just then."""

    def __init__(self, engine: Engine, ledger: Ledger, draw: Draw, canaries: tuple[Canary, ...]) -> None:
        self._engine = engine
        self._ledger = ledger
        self._draw = draw
        self._rng = draw.rng
        self._canaries = canaries
        self._compare = backend().name.startswith("cpu-")
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Ends `run` soon."""
        self._stopped.set()

    def run(self, seconds: float) -> None:
        """Waves: for a while so many answers are kept open, then all are waited for, and then it is quiet."""
        end = time.monotonic() + seconds
        wave = min(20.0, seconds / 16)
        for crowd in itertools.cycle(_CROWDS):
            until = min(end, time.monotonic() + self._rng.uniform(0, 2 * wave))
            while time.monotonic() < until and not self._stopped.is_set():
                if not self._come(crowd):
                    # Who is refused comes back later.
                    self._stopped.wait(self._rng.uniform(0, wave / 20))
                self._stopped.wait(self._rng.expovariate(1 / 0.02))
            while len(self._ledger) and not self._stopped.is_set():
                self._stopped.wait(0.02)
            self._stopped.wait(self._rng.uniform(0, wave / 2))
            if time.monotonic() >= end or self._stopped.is_set():
                return

    def _come(self, crowd: int) -> bool:
        """One or many at once, if there is room in the crowd; some go at the same time. Whether all were taken."""
        for _ in range(self._rng.choice([1, 1, 1, 1 + crowd // 3])):
            if len(self._ledger) >= crowd:
                break
            if not self._submit():
                return False
            if self._rng.random() < 0.15:
                self._cancel()
        return True

    def _submit(self) -> bool:
        if self._rng.random() < 0.4:
            canary = self._rng.choice(self._canaries)
            request, alone = self._draw.again(canary.request), canary.alone if self._compare else None
        else:
            request, alone = self._draw.request(), None
        self._ledger.begin(request, alone)
        try:
            self._engine.submit(request)
        except Overloaded:
            self._ledger.refuse(request)
            return False
        if request.timeout_seconds is not None:
            self._ledger.expect_end(request.id, time.monotonic() + request.timeout_seconds)
        return True

    def _cancel(self) -> None:
        # One that has ended by now is as good.
        requests = self._ledger.requests
        if requests:
            chosen = self._rng.choice(requests)
            self._ledger.cancel(chosen)
            self._engine.cancel(chosen)
            self._ledger.expect_end(chosen, time.monotonic())
