"""A long run of whatever may come: `loramill bench soak`. Nothing may grow, be lost or be mixed up."""

from __future__ import annotations

import gc
import itertools
import json
import logging
import math
import os
import random
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from loramill.bases import Base
from loramill.errors import AdapterInvalid, DeadlineExceeded, EngineFault, ModelNotFound, Overloaded
from loramill.kernels import backend
from loramill.kernels.bench.measure import Result
from loramill.serve.bench.subject import RANK, Subject, weights_file, write_adapters
from loramill.serve.engine import AdapterSource, Engine, EngineConfig, Finish, Output, Request, Sampling, TokenLogprobs
from loramill.serve.model import load_decoder

_STATM = Path("/proc/self/statm")  # of Linux
_FOLDERS, _VERSIONS, _TENANTS, _CANARIES = 8, 64, 5, 12
#: Seconds without any output for open answers until they count as lost.
_PATIENCE = 20.0
#: Seconds between two lines of the report, and between two looks at memory and books.
_LINE, _LOOK = 30.0, 0.5
#: Open answers that clients strive for in a wave: from a machine that mostly idles to one that must refuse.
_CROWDS = (24, 1, 120, 4)
#: By how much memory may grow from the second third of a run to the last; the caches fill in the first.
_GROWTH = 1.05

Key = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Said:
    """An answer as far as it got."""

    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish: Finish | None = None


@dataclass(frozen=True, slots=True)
class Canary:
    """A request that is repeated all the time, and its answers when nothing else was served."""

    request: Request
    alone: tuple[Said, ...]


@dataclass(slots=True)
class _Open:
    """An answer that is awaited.

    Attributes:
        alone: what it must say; None: nobody knows.
        due: when it must have ended after the next step, as it was cancelled or its time is up.
    """

    request: Request
    alone: Said | None
    due: float = math.inf
    cancelled: bool = False
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)


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
            _thin(folder, rank)
        subject = Subject(base, decoder, folders)
        report("Asking the canaries alone…")
        draw = _Draw(random.Random(seed), decoder.vocabulary)
        canaries = _alone(subject, [draw.request() for _ in range(_CANARIES)])
        # That engine's cache and slab are part of cycles, and would leave at some time during the run.
        gc.collect()
        engine = Engine(decoder, _unreliable(subject.source, seed), _config(subject))
        with _no_log_of_loads(), closing(engine):
            return _Run(engine, draw, canaries, report).run(seconds)


class _Draw:
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
            timeout=rng.choice([None, None, None, 10 ** rng.uniform(-2, 1)]),
        )

    def _sampling(self) -> Sampling:
        rng = self.rng
        echo = rng.random() < 0.1
        max_tokens = 0 if echo and rng.random() < 0.2 else rng.randint(1, 60)
        return Sampling(
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


def _thin(folder: Path, rank: int) -> None:
    """Leaves so many ranks of an adapter: then now slots and now bytes run out."""
    file, settings = weights_file(folder), folder / "adapter_config.json"
    weights = {
        name: (whole[:rank] if ".lora_A." in name else whole[:, :rank]).contiguous()
        for name, whole in load_file(file).items()
    }
    save_file(weights, file)
    settings.write_text(json.dumps({**json.loads(settings.read_text(encoding="utf-8")), "r": rank}), encoding="utf-8")


def _config(subject: Subject) -> EngineConfig:
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
        patience=16,
    )


def _unreliable(source: AdapterSource, seed: int) -> AdapterSource:
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
def _no_log_of_loads() -> Iterator[None]:
    """They fail on purpose; what else the engine has to say is heard."""
    loader = logging.getLogger("loramill.serve.engine.loader")
    loader.addFilter(_nothing)
    try:
        yield
    finally:
        loader.removeFilter(_nothing)


def _nothing(record: logging.LogRecord) -> bool:
    return False


def _alone(subject: Subject, requests: Iterable[Request]) -> tuple[Canary, ...]:
    """Asks for each answer by itself, of an engine that shares nothing and lacks nothing."""
    limits = replace(_config(subject), prefix_cache=False)
    with subject.engine(limits) as engine:
        canaries = []
        for request in requests:
            alone = []
            for index in range(request.sampling.n):
                # The n-th answer has the seed plus n.
                sampling = replace(request.sampling, n=1, seed=(request.sampling.seed or 0) + index)
                alone.append(_answer(engine, replace(request, sampling=sampling, timeout=None)))
            canaries.append(Canary(request, tuple(alone)))
    return tuple(canaries)


def _answer(engine: Engine, request: Request) -> Said:
    engine.submit(request)
    outputs: list[Output] = []
    latest = time.monotonic() + _PATIENCE
    while not outputs or outputs[-1].finish is None:
        if time.monotonic() > latest or not engine.wait(latest - time.monotonic()):
            raise EngineFault(f"Alone in the engine, and yet it waits in vain: {request}.")
        outputs += engine.step()
    if outputs[-1].error is not None:
        raise outputs[-1].error
    tokens = itertools.chain.from_iterable(output.tokens for output in outputs)
    logprobs = itertools.chain.from_iterable(output.logprobs for output in outputs)
    return Said(tuple(tokens), tuple(logprobs), outputs[-1].finish)


class Ledger:
    """What was asked for and what came. Clients `begin`, `refuse` and `cancel`; the thread that steps does the rest.

    Attributes:
        ends: answers by how they ended.
        compared: answers to canaries, whole or in part.
    """

    def __init__(self) -> None:
        self.ends: Counter[str] = Counter()
        self.compared = 0
        self._open: dict[Key, _Open] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._open)

    @property
    def requests(self) -> list[str]:
        """Ids of which answers are open."""
        with self._lock:
            return list(dict.fromkeys(id_ for id_, _ in self._open))

    def begin(self, request: Request, alone: tuple[Said, ...] | None) -> None:
        """A request is about to be submitted."""
        with self._lock:
            for index in range(request.sampling.n):
                self._open[request.id, index] = _Open(request, None if alone is None else alone[index])

    def refuse(self, request: Request) -> None:
        """It wasn't taken."""
        with self._lock:
            for index in range(request.sampling.n):
                del self._open[request.id, index]
            self.ends["refused"] += 1

    def cancel(self, id_: str) -> None:
        """A request is about to be cancelled."""
        with self._lock:
            for answer in self._of(id_):
                answer.cancelled = True

    def expect_end(self, id_: str, when: float) -> None:
        """After a step that begins after `when` (of the monotonic clock) nothing more may come."""
        with self._lock:
            for answer in self._of(id_):
                answer.due = min(answer.due, when)

    def overdue(self, now: float) -> list[Key]:
        """What must have ended after the next step."""
        with self._lock:
            return [key for key, answer in self._open.items() if answer.due <= now]

    def check_ended(self, keys: Iterable[Key]) -> None:
        """Raises EngineFault if one of them is still open."""
        left = [key for key in keys if key in self._open]
        if left:
            raise EngineFault(f"Answers {left} were cancelled or out of time before a step, and live on after it.")

    def check_flow(self, since: float) -> None:
        """Raises EngineFault with the answers that nobody gives, if nothing came for so many seconds."""
        if since > _PATIENCE:
            with self._lock:
                waiting = [f"{id_}[{i}] of version {a.request.version}" for (id_, i), a in self._open.items()]
            raise EngineFault(f"No output for {since:.0f} s, and {len(waiting)} answers are open: {waiting}.")

    def take(self, output: Output) -> None:
        """Raises EngineFault if an output isn't awaited or says what it must not."""
        key = (output.request, output.index)
        with self._lock:
            answer = self._open.get(key)
            if answer is None:
                raise EngineFault(f"An output for answer {key}, which has ended or was never asked for: {output}.")
            if output.finish is not None:
                del self._open[key]
        answer.tokens += output.tokens
        answer.logprobs += output.logprobs
        wrong = _wrong(answer, output)
        if wrong:
            raise EngineFault(f"Answer {key} {wrong}. It was {answer.request}; the last output is {output}.")
        if output.finish is not None:
            self.compared += answer.alone is not None
            error = type(output.error).__name__ if output.error is not None else ""
            self.ends[error or output.finish] += 1

    def _of(self, id_: str) -> list[_Open]:
        return [answer for (its, _), answer in self._open.items() if its == id_]


def _wrong(answer: _Open, output: Output) -> str:
    """What is wrong with an answer after an output, in words; empty: nothing."""
    request, sampling = answer.request, answer.request.sampling
    told = len(request.tokens) if sampling.echo and answer.tokens else 0
    own = answer.tokens[told:]
    timed = request.timeout is not None
    known = {
        Finish.LENGTH: len(own) == sampling.max_tokens and bool(told) == sampling.echo,
        Finish.STOP: bool(sampling.stop_ids) and sampling.min_tokens <= len(own) < sampling.max_tokens,
        Finish.CANCELLED: answer.cancelled and not output.tokens,
        Finish.ERROR: (timed and isinstance(output.error, DeadlineExceeded))
        or (request.version is not None and isinstance(output.error, (ModelNotFound, AdapterInvalid))),
        None: len(own) < sampling.max_tokens and bool(output.tokens),
    }
    if not known[output.finish]:
        return f"ended by {output.finish} ({output.error!r}) with {len(own)} tokens"
    if told and tuple(answer.tokens[:told]) != request.tokens:
        return "echoes another prompt"
    if not set(own).isdisjoint(sampling.stop_ids):
        return "goes on behind a stop token"
    if len(answer.logprobs) != (0 if sampling.logprobs is None else len(answer.tokens)):
        return f"has {len(answer.logprobs)} log probabilities for {len(answer.tokens)} tokens"
    return "" if answer.alone is None else _differs(answer, answer.alone, output.finish)


def _differs(answer: _Open, alone: Said, finish: Finish | None) -> str:
    count = len(answer.tokens)
    if tuple(answer.tokens) != alone.tokens[:count]:
        return f"says {answer.tokens}; alone it was {list(alone.tokens)}"
    if tuple(answer.logprobs) != alone.logprobs[: len(answer.logprobs)]:
        return f"has the log probabilities {answer.logprobs}; alone they were {alone.logprobs}"
    if finish in (Finish.LENGTH, Finish.STOP) and (finish, count) != (alone.finish, len(alone.tokens)):
        return f"ended by {finish} with {count} tokens; alone by {alone.finish} with {len(alone.tokens)}"
    return ""


class _Clients:
    """Who submits and cancels, in a thread of their own: at any moment, whatever the engine does just then."""

    def __init__(self, engine: Engine, ledger: Ledger, draw: _Draw, canaries: tuple[Canary, ...]) -> None:
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
        if request.timeout is not None:
            self._ledger.expect_end(request.id, time.monotonic() + request.timeout)
        return True

    def _cancel(self) -> None:
        # One that has ended by now is as good.
        requests = self._ledger.requests
        if requests:
            chosen = self._rng.choice(requests)
            self._ledger.cancel(chosen)
            self._engine.cancel(chosen)
            self._ledger.expect_end(chosen, time.monotonic())


class _Run:
    """The thread that steps, and what it looks at between steps."""

    def __init__(
        self, engine: Engine, draw: _Draw, canaries: tuple[Canary, ...], report: Callable[[str], object]
    ) -> None:
        self._engine = engine
        self._ledger = Ledger()
        self._clients = _Clients(engine, self._ledger, draw, canaries)
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
                self._thirds[third] = max(self._thirds[third], _resident())
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
        return f"{passed:.0f} s: {ends}; {len(self._ledger)} open; {_resident() >> 20} MiB"

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


def _resident() -> int:
    """Bytes of memory that this process has now; 0 where the system doesn't say."""
    return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGESIZE") if _STATM.exists() else 0
