"""The traffic of a soak test: random requests in waves, unreliable adapter loads, and an engine with little memory."""

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
from loramill_bench.engine.harness import RANK, Harness, weights_file
from loramill_bench.soak.tracker import AnswerTracker, Canary

_VERSIONS, _TENANTS = 64, 5
#: Maximum open answers per wave: from an engine that is mostly idle to one that has to refuse requests.
_OPEN_ANSWERS = (24, 1, 120, 4)


class RequestGenerator:
    """Generates random requests with unique ids."""

    def __init__(self, rng: random.Random, vocabulary: int) -> None:
        self.rng = rng
        self._vocabulary = vocabulary
        self._ids = itertools.count()

    def random(self) -> Request:
        """A short or long request for any version and tenant, with any sampling parameters."""
        rng = self.rng
        # Some prompts share a prefix.
        start = [7] * rng.choice([0, 0, 64, 200])
        tokens = start + [rng.randrange(self._vocabulary) for _ in range(rng.randint(1, 200))]
        ranks = range(1, _VERSIONS + 1)
        (version,) = rng.choices(ranks, [1 / rank for rank in ranks])
        request = Request("", "", tuple(tokens), self._sampling(), rng.choice([None, *[str(version)] * 4]))
        return self.repeat(request)

    def repeat(self, request: Request) -> Request:
        """The same request with another id, tenant, priority and timeout."""
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


def truncate_rank(folder: Path, rank: int) -> None:
    """Keeps only the first ranks of an adapter, so that sometimes slots and sometimes bytes are exhausted."""
    file, settings = weights_file(folder), folder / "adapter_config.json"
    weights = {
        name: (weight[:rank] if ".lora_A." in name else weight[:, :rank]).contiguous()
        for name, weight in load_file(file).items()
    }
    save_file(weights, file)
    settings.write_text(json.dumps({**json.loads(settings.read_text(encoding="utf-8")), "r": rank}), encoding="utf-8")


def scarce_config(harness: Harness) -> EngineConfig:
    """An engine config in which every resource is scarce."""
    adapter = weights_file(harness.adapters[0]).stat().st_size
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


def unreliable_source(source: AdapterSource, seed: int) -> AdapterSource:
    """An adapter source that is sometimes slow, and sometimes fails with a known or an unknown error."""
    rng = random.Random(seed)

    def find(version: str) -> Path:
        chance = rng.random()
        if chance < 0.02:
            raise ModelNotFound(f"Version {version} is gone for now.")
        if chance < 0.04:
            raise OSError("the disk failed")
        if chance < 0.2:
            time.sleep(0.2 * rng.random())
        return source(version)

    return find


@contextmanager
def load_errors_hidden() -> Iterator[None]:
    """Drops the loader's log messages, since loads fail on purpose; other messages are still logged."""
    loader = logging.getLogger("loramill.serve.engine.adapters.loader")
    loader.addFilter(_drop_all)
    try:
        yield
    finally:
        loader.removeFilter(_drop_all)


def _drop_all(record: logging.LogRecord) -> bool:
    return False


class Clients:
    """Submits and cancels requests in its own thread, at any moment of the engine's steps."""

    def __init__(
        self, engine: Engine, tracker: AnswerTracker, generator: RequestGenerator, canaries: tuple[Canary, ...]
    ) -> None:
        self._engine = engine
        self._tracker = tracker
        self._generator = generator
        self._rng = generator.rng
        self._canaries = canaries
        self._bits_repeat = backend().name.startswith("cpu-")
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Makes `run` return soon."""
        self._stopped.set()

    def run(self, seconds: float) -> None:
        """Submits in waves: keeps up to a number of answers open for a while, waits for all of them, and pauses."""
        end = time.monotonic() + seconds
        wave = min(20.0, seconds / 16)
        for limit in itertools.cycle(_OPEN_ANSWERS):
            until = min(end, time.monotonic() + self._rng.uniform(0, 2 * wave))
            while time.monotonic() < until and not self._stopped.is_set():
                if not self._submit_some(limit):
                    # A client that was refused retries later.
                    self._stopped.wait(self._rng.uniform(0, wave / 20))
                self._stopped.wait(self._rng.expovariate(1 / 0.02))
            while len(self._tracker) and not self._stopped.is_set():
                self._stopped.wait(0.02)
            self._stopped.wait(self._rng.uniform(0, wave / 2))
            if time.monotonic() >= end or self._stopped.is_set():
                return

    def _submit_some(self, limit: int) -> bool:
        """Submits some requests, up to `limit` open answers, and cancels some; returns False if one was refused."""
        for _ in range(self._rng.choice([1, 1, 1, 1 + limit // 3])):
            if len(self._tracker) >= limit:
                break
            if not self._submit():
                return False
            if self._rng.random() < 0.15:
                self._cancel()
        return True

    def _submit(self) -> bool:
        if self._rng.random() < 0.4:
            canary = self._rng.choice(self._canaries)
            request, expected = self._generator.repeat(canary.request), canary.expected if self._bits_repeat else None
        else:
            request, expected = self._generator.random(), None
        self._tracker.add(request, expected)
        try:
            self._engine.submit(request)
        except Overloaded:
            self._tracker.remove_refused(request)
            return False
        if request.timeout_seconds is not None:
            self._tracker.expect_end(request.id, time.monotonic() + request.timeout_seconds)
        return True

    def _cancel(self) -> None:
        # The request may have ended in the meantime.
        requests = self._tracker.open_request_ids
        if requests:
            chosen = self._rng.choice(requests)
            self._tracker.mark_cancelled(chosen)
            self._engine.cancel(chosen)
            self._tracker.expect_end(chosen, time.monotonic())
