"""A long run of whatever may come: `loramill-bench soak`. Nothing may grow, be lost or be mixed up."""

from __future__ import annotations

import gc
import itertools
import random
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch

from loramill.errors import EngineFault
from loramill.models.catalog import Base
from loramill.serve.engine import Engine, Output, Request
from loramill.serve.model import load_decoder
from loramill_bench.engine import ledger, memory
from loramill_bench.engine.ledger import Canary, Ledger, Said
from loramill_bench.engine.subject import Subject, write_adapters
from loramill_bench.engine.traffic import Clients, Draw, no_log_of_loads, scarce_config, thin, unreliable
from loramill_bench.measure import Result

_FOLDERS, _CANARIES = 8, 12
#: Seconds between two lines of the report, and between two looks at memory and books.
_LINE, _LOOK = 30.0, 0.5
#: By how much memory may grow from the second third of a run to the last; the caches fill in the first.
_GROWTH = 1.05


def soak(base: Base, seconds: float, report: Callable[[str], object], *, seed: int = 0) -> list[Result]:
    """Serves random requests in waves, cancels some, lets loads fail, and checks answers, books and memory.

    Some requests are repeated all the time and must be answered as they were alone: by the native kernels, that is,
    as others give a row other bits in other company.

    Args:
        base: that is served, in bfloat16.
        seconds: in which requests come; it ends when the last is answered.
        report: is told every half minute how it goes.
        seed: of the requests; when they come depends on the machine.

    Returns:
        What happened how often, and by how much memory grew, with its target.

    Raises:
        EngineFault: an answer was wrong, lost, given twice or too late, or the books don't add up.
    """
    with tempfile.TemporaryDirectory(prefix="loramill-soak-") as scratch:
        decoder = load_decoder(base.folder, dtype=torch.bfloat16, threads=1)
        folders = write_adapters(decoder, Path(scratch), _FOLDERS)
        for folder, rank in zip(folders[1::2], itertools.cycle((1, 5, 8)), strict=False):
            thin(folder, rank)
        subject = Subject(base, decoder, folders)
        report("Asking the canaries alone…")
        draw = Draw(random.Random(seed), decoder.vocabulary)
        canaries = _alone(subject, [draw.request() for _ in range(_CANARIES)])
        # That engine's cache and slab are part of cycles, and would leave at some time during the run.
        gc.collect()
        engine = Engine(decoder, unreliable(subject.source, seed), scarce_config(subject))
        with no_log_of_loads(), closing(engine):
            return _Run(engine, draw, canaries, report).run(seconds)


def _alone(subject: Subject, requests: Iterable[Request]) -> tuple[Canary, ...]:
    """Asks for each answer by itself, of an engine that shares nothing and lacks nothing."""
    limits = replace(scarce_config(subject), prefix_cache=False)
    with subject.engine(limits) as engine:
        canaries = []
        for request in requests:
            alone = []
            for index in range(request.sampling_params.n):
                # The n-th answer has the seed plus n.
                sampling = replace(request.sampling_params, n=1, seed=(request.sampling_params.seed or 0) + index)
                alone.append(_answer(engine, replace(request, sampling_params=sampling, timeout_seconds=None)))
            canaries.append(Canary(request, tuple(alone)))
    return tuple(canaries)


def _answer(engine: Engine, request: Request) -> Said:
    engine.submit(request)
    outputs: list[Output] = []
    latest = time.monotonic() + ledger.PATIENCE
    while not outputs or outputs[-1].finish_reason is None:
        if time.monotonic() > latest or not engine.wait(latest - time.monotonic()):
            raise EngineFault(f"Alone in the engine, and yet it waits in vain: {request}.")
        outputs += engine.step()
    if outputs[-1].error is not None:
        raise outputs[-1].error
    tokens = itertools.chain.from_iterable(output.tokens for output in outputs)
    logprobs = itertools.chain.from_iterable(output.logprobs for output in outputs)
    return Said(tuple(tokens), tuple(logprobs), outputs[-1].finish_reason)


class _Run:
    """The thread that steps, and what it looks at between steps."""

    def __init__(
        self, engine: Engine, draw: Draw, canaries: tuple[Canary, ...], report: Callable[[str], object]
    ) -> None:
        self._engine = engine
        self._ledger = Ledger()
        self._clients = Clients(engine, self._ledger, draw, canaries)
        self._report = report
        self._thirds = [0, 0, 0]
        self._idle = 0.0
        self._crowded = 0

    def run(self, seconds: float) -> list[Result]:
        began = time.monotonic()
        with ThreadPoolExecutor(1, thread_name_prefix="soak-clients") as threads:
            clients = threads.submit(self._clients.run, seconds)
            try:
                self._serve(clients, began, seconds)
            finally:
                self._clients.stop()
        self._check()
        return self._results(time.monotonic() - began)

    def _serve(self, clients: Future[None], began: float, seconds: float) -> None:
        delivered = looked = said = began
        while not clients.done() or len(self._ledger):
            if clients.done():
                clients.result()
            if self._step() or not len(self._ledger):
                delivered = time.monotonic()
            now = time.monotonic()
            self._ledger.check_flow(now - delivered)
            if now > looked + _LOOK:
                looked = now
                self._check()
                third = min(2, int(3 * (now - began) / seconds))
                self._thirds[third] = max(self._thirds[third], memory.resident())
            if now > said + _LINE:
                said = now
                self._report(self._line(now - began))

    def _step(self) -> bool:
        """Waits a little for work and does it; tells whether anything came of it."""
        before = time.monotonic()
        work = self._engine.wait(0.05)
        self._idle += time.monotonic() - before
        if not work:
            return False
        overdue = self._ledger.overdue(time.monotonic())
        outputs = self._engine.step()
        for output in outputs:
            self._ledger.take(output)
        self._ledger.check_ended(overdue)
        self._crowded += self._engine.stats.waiting > 0
        return bool(outputs)

    def _check(self) -> None:
        self._engine.check_integrity()
        stats = self._engine.stats
        if not stats.running and stats.free_blocks != stats.blocks:
            raise EngineFault(f"Nobody runs, and yet blocks are held: {stats}.")

    def _line(self, passed: float) -> str:
        ends = ", ".join(f"{count} {end}" for end, count in sorted(self._ledger.ends.items()))
        return f"{passed:.0f} s: {ends}; {len(self._ledger)} open; {memory.resident() >> 20} MiB"

    def _results(self, seconds: float) -> list[Result]:
        stats, ends = self._engine.stats, self._ledger.ends
        if (stats.waiting, stats.running) != (0, 0):
            raise EngineFault(f"All answers were given, and yet: {stats}.")
        counts: Mapping[str, float] = {
            **{f"answers: {end}": count for end, count in sorted(ends.items())},
            "answers compared with alone": self._ledger.compared,
            "tokens generated": stats.generated_tokens,
            "tokens spared by the prefix cache": stats.reused_tokens,
            "steps": stats.steps,
            "steps with answers waiting": self._crowded,
            "preemptions": stats.preemptions,
            "adapters loaded": stats.loads,
            "adapters evicted": stats.loads - len(stats.resident),
            "loads failed": stats.load_failures,
        }
        results = [Result(f"soak: {name}", count, "in all") for name, count in counts.items()]
        results.append(Result("soak: time", seconds, "s"))
        results.append(Result("soak: time without work", self._idle / seconds, "of it"))
        _, second, last = self._thirds
        if second and last:
            results.append(Result("soak: memory", last / 2**20, "MiB at most in the last third"))
            results.append(Result("soak: memory growth", last / second, "of the second third's", _GROWTH))
        return results
