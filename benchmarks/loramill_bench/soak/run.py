"""A long run of random requests with faults, in which every answer is checked: `loramill-bench soak`."""

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
from loramill_bench.engine import memory
from loramill_bench.engine.harness import Harness, write_adapters
from loramill_bench.results import Result
from loramill_bench.soak import tracker
from loramill_bench.soak.tracker import AnswerTracker, Canary, ExpectedAnswer
from loramill_bench.soak.traffic import (
    Clients,
    RequestGenerator,
    load_errors_hidden,
    scarce_config,
    truncate_rank,
    unreliable_source,
)

_ADAPTERS, _CANARIES = 8, 12
#: Seconds between two progress reports, and between two checks of memory and invariants.
_REPORT_SECONDS, _CHECK_SECONDS = 30.0, 0.5
#: Maximum memory of the last third of a run relative to the second; caches fill up in the first.
_MAX_GROWTH = 1.05


def soak(base: Base, seconds: float, report: Callable[[str], object], *, seed: int = 0) -> list[Result]:
    """Serves random requests in waves, cancels some, makes loads fail, and checks answers, invariants and memory.

    Some requests (canaries) are repeated throughout, and must get the same answers as when they were served alone. This
    is checked only with the native kernels, since with other backends a row's bits depend on its batch.

    Args:
        base: The served base, in bfloat16.
        seconds: Time for which requests are submitted; the run ends when the last is answered.
        report: Called with the progress every half minute.
        seed: Seed of the requests; their timing depends on the machine.

    Returns:
        Counts of what happened, and the growth of memory with its target.

    Raises:
        EngineFault: An answer was wrong, lost, duplicated or late, or an invariant of the engine is violated.
    """
    with tempfile.TemporaryDirectory(prefix="loramill-soak-") as scratch:
        decoder = load_decoder(base.folder, dtype=torch.bfloat16, threads=1)
        folders = write_adapters(decoder, Path(scratch), _ADAPTERS)
        for folder, rank in zip(folders[1::2], itertools.cycle((1, 5, 8)), strict=False):
            truncate_rank(folder, rank)
        harness = Harness(base, decoder, folders)
        report("Serving the canaries alone…")
        generator = RequestGenerator(random.Random(seed), decoder.vocabulary)
        canaries = _expected_answers(harness, [generator.random() for _ in range(_CANARIES)])
        # The cache and slab of that engine are in reference cycles, and would be freed at some time during the run.
        gc.collect()
        engine = Engine(decoder, unreliable_source(harness.source, seed), scarce_config(harness))
        with load_errors_hidden(), closing(engine):
            return _Run(engine, generator, canaries, report).run(seconds)


def _expected_answers(harness: Harness, requests: Iterable[Request]) -> tuple[Canary, ...]:
    """Serves each answer alone, by an engine without a prefix cache."""
    limits = replace(scarce_config(harness), prefix_cache=False)
    with harness.engine(limits) as engine:
        canaries = []
        for request in requests:
            answers = []
            for index in range(request.sampling_params.n):
                # Answer n of a request has the seed plus n.
                sampling = replace(request.sampling_params, n=1, seed=(request.sampling_params.seed or 0) + index)
                answers.append(_answer(engine, replace(request, sampling_params=sampling, timeout_seconds=None)))
            canaries.append(Canary(request, tuple(answers)))
    return tuple(canaries)


def _answer(engine: Engine, request: Request) -> ExpectedAnswer:
    engine.submit(request)
    outputs: list[Output] = []
    latest = time.monotonic() + tracker.PATIENCE
    while not outputs or outputs[-1].finish_reason is None:
        if time.monotonic() > latest or not engine.wait(latest - time.monotonic()):
            raise EngineFault(f"The only request in the engine gets no answer: {request}.")
        if new := engine.step():
            outputs += new
            latest = time.monotonic() + tracker.PATIENCE
    if outputs[-1].error is not None:
        raise outputs[-1].error
    tokens = itertools.chain.from_iterable(output.tokens for output in outputs)
    logprobs = itertools.chain.from_iterable(output.logprobs for output in outputs)
    return ExpectedAnswer(tuple(tokens), tuple(logprobs), outputs[-1].finish_reason)


class _Run:
    """The stepping thread, and its checks between steps."""

    def __init__(
        self, engine: Engine, generator: RequestGenerator, canaries: tuple[Canary, ...], report: Callable[[str], object]
    ) -> None:
        self._engine = engine
        self._tracker = AnswerTracker()
        self._clients = Clients(engine, self._tracker, generator, canaries)
        self._report = report
        self._resident_bytes: list[int] = []
        self._idle_seconds = 0.0
        self._steps_with_waiting = 0

    def run(self, seconds: float) -> list[Result]:
        began = time.monotonic()
        with ThreadPoolExecutor(1, thread_name_prefix="soak-clients") as threads:
            clients = threads.submit(self._clients.run, seconds)
            try:
                self._serve(clients, began)
            finally:
                self._clients.stop()
        self._check()
        return self._results(time.monotonic() - began)

    def _serve(self, clients: Future[None], began: float) -> None:
        delivered = checked = reported = began
        while not clients.done() or len(self._tracker):
            if clients.done():
                clients.result()
            if self._step() or not len(self._tracker):
                delivered = time.monotonic()
            now = time.monotonic()
            self._tracker.check_progress(now - delivered)
            if now > checked + _CHECK_SECONDS:
                checked = now
                self._check()
                self._resident_bytes.append(memory.resident_bytes())
            if now > reported + _REPORT_SECONDS:
                reported = now
                self._report(self._progress(now - began))

    def _step(self) -> bool:
        """Waits shortly for work and takes a step; returns whether there was an output."""
        before = time.monotonic()
        work = self._engine.wait(0.05)
        self._idle_seconds += time.monotonic() - before
        if not work:
            return False
        overdue = self._tracker.overdue(time.monotonic())
        outputs = self._engine.step()
        for output in outputs:
            self._tracker.check_output(output)
        self._tracker.check_ended(overdue)
        self._steps_with_waiting += self._engine.stats.waiting > 0
        return bool(outputs)

    def _check(self) -> None:
        self._engine.check_integrity()
        stats = self._engine.stats
        if not stats.running and stats.free_blocks != stats.blocks:
            raise EngineFault(f"No request is running, but blocks are in use: {stats}.")

    def _progress(self, passed: float) -> str:
        ends = ", ".join(f"{count} {end}" for end, count in sorted(self._tracker.ends.items()))
        return f"{passed:.0f} s: {ends}; {len(self._tracker)} open; {memory.resident_bytes() >> 20} MiB"

    def _results(self, seconds: float) -> list[Result]:
        stats, ends = self._engine.stats, self._tracker.ends
        if (stats.waiting, stats.running) != (0, 0):
            raise EngineFault(f"All answers have ended, but requests are waiting or running: {stats}.")
        counts: Mapping[str, float] = {
            **{f"answers: {end}": count for end, count in sorted(ends.items())},
            "answers compared with the expected ones": self._tracker.compared,
            "tokens generated": stats.generated_tokens,
            "tokens reused from the prefix cache": stats.reused_tokens,
            "steps": stats.steps,
            "steps with waiting answers": self._steps_with_waiting,
            "preemptions": stats.preemptions,
            "adapters loaded": stats.loads,
            "adapters evicted": stats.loads - len(stats.resident),
            "failed loads": stats.load_failures,
        }
        results = [Result(f"soak: {name}", count, "in all") for name, count in counts.items()]
        results.append(Result("soak: time", seconds, "s"))
        results.append(Result("soak: idle time", self._idle_seconds / seconds, "of the time"))
        # A third of the checks rather than of the time: a busy machine may make none in a third of a short run.
        resident, third = self._resident_bytes, len(self._resident_bytes) // 3
        if third and all(resident):
            second, last = max(resident[third:-third]), max(resident[-third:])
            results.append(Result("soak: memory", last / 2**20, "MiB, maximum of the last third"))
            results.append(Result("soak: memory growth", last / second, "of the second third's", _MAX_GROWTH))
        return results
