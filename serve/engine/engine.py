"""Continuous batching: many requests, many adapters, one forward a step."""

from __future__ import annotations

import gc
import heapq
import itertools
import logging
import threading
import time
from collections import Counter
from dataclasses import replace

import torch

from loramill.errors import (
    AdapterInvalid,
    Conflict,
    DeadlineExceeded,
    EngineFault,
    LoramillError,
    Overloaded,
    Unavailable,
)
from loramill.kernels import Batch
from loramill.serve.engine.adapters.manager import AdapterManager
from loramill.serve.engine.durations import DurationHistogram
from loramill.serve.engine.request import RequestState
from loramill.serve.engine.sampler import Sampler, sample, token_logprobs
from loramill.serve.engine.scheduler import RunningSequence, ScheduledChunk, Scheduler, StepPlan
from loramill.serve.engine.types import (
    AdapterSource,
    EngineConfig,
    EngineStats,
    FinishReason,
    Output,
    Request,
    TokenLogprobs,
)
from loramill.serve.engine.validation import answer_limit
from loramill.serve.engine.warmup import warm_up
from loramill.serve.model import Chunk, Model

log = logging.getLogger(__name__)


class Engine:
    """Serves requests for one base and any number of its adapters.

    One thread calls `step` and `check_integrity`; any thread may call the rest.
    """

    def __init__(self, model: Model, source: AdapterSource, config: EngineConfig) -> None:
        self._model = model
        self._source = source
        self._config = config
        self._changed = threading.Condition()
        # Held during a step, so that nothing is closed or begun anew under it.
        self._stepping = threading.Lock()
        self._work_pending = False
        self._closed = False
        # In the order of the calls: answers to be given, and ids of requests to cancel.
        self._inbox: list[RequestState | str] = []
        self._numbers = itertools.count()
        self._live: dict[int, RequestState] = {}
        self._requests: dict[str, set[int]] = {}
        self._deadlines: list[tuple[float, int]] = []
        self._totals: Counter[str] = Counter()
        self._waits, self._step_times, self._load_times = DurationHistogram(), DurationHistogram(), DurationHistogram()
        self._init_state()
        self._stats = self._collect_stats()

    def _init_state(self) -> None:
        c = self._config
        blocks = c.kv_tokens // c.block_size
        self._cache = self._model.new_cache(blocks, c.block_size)
        self._adapters = AdapterManager(self._model, self._source, c, self._wake, self._load_times)
        self._scheduler = Scheduler(
            blocks,
            c.block_size,
            c.max_batch_tokens,
            c.max_sequences,
            rank_budget=c.rank_budget,
            rank_of=self._adapters.rank,
        )

    def warm_up(self) -> None:
        """Takes the model's first steps, which are slow, before anybody waits for them; to be called before `step`."""
        with self._stepping:
            warm_up(self._model, self._cache, self._adapters.slab, self._config)

    def submit(self, request: Request) -> None:
        """Takes a request; its outputs come from `step`.

        Raises:
            InvalidRequest: a field makes no sense.
            ContextLengthExceeded: the prompt leaves no room for an answer.
            Conflict: a request of this id is being served.
            Overloaded: too many are waiting.
            Unavailable: the engine is closed.
        """
        answers = self._answers(request)
        with self._changed:
            if self._closed:
                raise Unavailable("The engine is closed.")
            if request.id in self._requests:
                raise Conflict(f"A request with the id {request.id} is being served; ids must differ.")
            self._make_room(request.tenant)
            self._requests[request.id] = {answer.sequence.id for answer in answers}
            for answer in answers:
                self._live[answer.sequence.id] = answer
                if request.timeout_seconds is not None:
                    heapq.heappush(self._deadlines, (time.monotonic() + request.timeout_seconds, answer.sequence.id))
            self._inbox += answers
        self._wake()

    def cancel(self, request_id: str) -> None:
        """Ends a request's answers with outputs CANCELLED from the next step; nothing happens if it has ended."""
        with self._changed:
            self._inbox.append(request_id)
        self._wake()

    @property
    def has_work(self) -> bool:
        """Whether a step may get something done now; False also while requests wait for adapters being fetched."""
        with self._changed:
            return not self._closed and (self._work_pending or self._seconds_left() <= 0)

    def wait(self, timeout: float) -> bool:
        """Blocks until there may be work for `step`, at most `timeout` seconds; tells whether there is."""
        with self._changed:
            self._changed.wait_for(lambda: self._work_pending, max(0.0, min(timeout, self._seconds_left())))
            return self.has_work

    @property
    def stats(self) -> EngineStats:
        """A look at the engine after its last step, with the answers that wait by now."""
        with self._changed:
            return replace(self._stats, waiting=max(0, len(self._live) - self._stats.running))

    def step(self) -> list[Output]:
        """Takes in what was submitted, cancelled and loaded, then runs the model once.

        Never raises for what a request or an adapter does: it gets an output with an error, and the engine goes on.
        It raises if even the cache can't be made anew after a fault; then the engine is closed.
        """
        with self._stepping:
            return self._step()

    def _step(self) -> list[Output]:
        with self._changed:
            self._work_pending = False
            if self._closed:
                return []
            inbox, self._inbox = self._inbox, []
        outputs: list[Output] = []
        fault: EngineFault | None = None
        try:
            self._drain_inbox(inbox, outputs)
            plan = self._scheduler.schedule(self._adapters.ready)
            for number in plan.admitted:
                self._adapters.begin_use(self._live[number].request.version)
                self._note_wait(self._live[number])
            for number in plan.preempted:
                self._adapters.end_use(self._live[number].request.version)
            if plan.chunks:
                began = time.perf_counter()
                self._run(plan, outputs)
                self._step_times.observe(time.perf_counter() - began)
            self._count(plan, outputs)
        except Exception as error:
            log.exception("a step failed outside the model")
            fault = EngineFault(f"A step failed: {error!r}.")
        # Here the exception is gone, and with it what its frames held of the old books.
        if fault is not None:
            outputs += self._reset_after_fault(fault)
        with self._changed:
            self._work_pending |= bool(outputs) or bool(self._scheduler.running)
            self._stats = self._collect_stats()
        return outputs

    def check_integrity(self) -> None:
        """Compares all books: blocks, queues, slots, pins. May be called between any two steps.

        Raises:
            EngineFault: they don't add up.
        """
        self._scheduler.check_integrity()
        users = Counter(s.version for s in self._scheduler.sequences if s.version is not None)
        pins = Counter(s.version for s in self._scheduler.running if s.version is not None)
        self._adapters.check_integrity(dict(users), dict(pins))
        with self._changed:
            fresh = [answer.sequence.id for answer in self._inbox if isinstance(answer, RequestState)]
            if {*fresh, *(s.id for s in self._scheduler.sequences)} != set(self._live):
                raise EngineFault(f"{len(self._live)} answers live; {len(fresh)} are new, the scheduler's differ.")
            if set().union(*self._requests.values()) != set(self._live):
                raise EngineFault(f"{len(self._requests)} requests are open; the answers that live aren't theirs.")

    def close(self) -> None:
        """Refuses further requests and ends the side threads; live requests get no further output.

        It waits for the step and the fetches that have begun.
        """
        with self._stepping:
            with self._changed:
                closed, self._closed = self._closed, True
            if not closed:
                self._adapters.close()

    def _make_room(self, tenant: str) -> None:
        """Where all places are taken, takes one to wait of a tenant that has more of them than the newcomer's.

        Raises:
            Overloaded: there is none.
        """
        if len(self._live) < self._config.max_sequences + self._config.max_waiting:
            return
        staying = [answer for answer in self._live.values() if not answer.overload_victim]
        if len(staying) < self._config.max_sequences + self._config.max_waiting:
            return
        waiting = [answer for answer in staying if answer.waiting_since is not None]
        tenants = Counter(answer.request.tenant for answer in waiting)
        fullest, most = next(iter(tenants.most_common(1)), ("", 0))
        if most <= tenants[tenant] + 1:
            raise _overloaded(len(waiting))
        newest = next(answer for answer in reversed(waiting) if answer.request.tenant == fullest)
        newest.overload_victim = True

    def _answers(self, request: Request) -> list[RequestState]:
        c, sampling = self._config, request.sampling_params
        limit = answer_limit(
            request,
            vocabulary=self._model.vocabulary,
            context_length=self._model.context_length,
            kv_tokens=c.kv_tokens // c.block_size * c.block_size,
        )
        # An echo with log probabilities needs every position's logits, which no cache holds.
        reuse = c.prefix_cache and not (sampling.echo and sampling.logprobs is not None)
        return [
            RequestState(
                request,
                index,
                RunningSequence(
                    next(self._numbers),
                    request.tenant,
                    request.version,
                    list(request.tokens),
                    priority=request.priority,
                    use_prefix_cache=reuse,
                ),
                Sampler(sampling, request.tokens, index, request.mask() if request.mask is not None else None),
                limit,
                sampling.echo,
            )
            for index in range(sampling.n)
        ]

    def _wake(self) -> None:
        with self._changed:
            self._work_pending = True
            self._changed.notify_all()

    def _seconds_left(self) -> float:
        """Until the next answer's time is up."""
        while self._deadlines and self._deadlines[0][1] not in self._live:
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] - time.monotonic() if self._deadlines else threading.TIMEOUT_MAX

    def _drain_inbox(self, inbox: list[RequestState | str], outputs: list[Output]) -> None:
        for item in inbox:
            if isinstance(item, RequestState):
                self._scheduler.add(item.sequence)
                self._adapters.acquire(item.request.version)
            else:
                known = [number for number in self._requests.get(item, ()) if number in self._scheduler]
                outputs += (self._end(number, FinishReason.CANCELLED) for number in sorted(known))
        outputs += (
            self._end(number, FinishReason.ERROR, _overloaded(self._config.max_waiting))
            for number in self._overload_victims()
        )
        outputs += (self._end(number, FinishReason.ERROR, _too_late(self._live[number])) for number in self._overdue())
        for version, error in self._adapters.collect_loaded():
            waiting = [sequence.id for sequence in self._scheduler.sequences if sequence.version == version]
            outputs += (self._end(number, FinishReason.ERROR, error) for number in waiting)
        self._adapters.advance()

    def _overload_victims(self) -> list[int]:
        """Answers that have to give up their places; one that has begun to run meanwhile keeps its own."""
        with self._changed:
            displaced = [
                a.sequence.id for a in self._live.values() if a.overload_victim and a.waiting_since is not None
            ]
        return [number for number in displaced if number in self._scheduler]

    def _overdue(self) -> list[int]:
        """Takes the answers whose time is up."""
        with self._changed:
            late = []
            while self._seconds_left() <= 0:
                late.append(heapq.heappop(self._deadlines))
            # Those that came since the step began are for the next.
            for entry in late:
                if entry[1] not in self._scheduler:
                    heapq.heappush(self._deadlines, entry)
        return [number for _, number in late if number in self._scheduler]

    def _run(self, plan: StepPlan, outputs: list[Output]) -> None:
        # Sorted by adapter, so that each is one run of rows.
        shares = sorted(plan.chunks, key=self._slot_order)
        chunks = [self._chunk(share) for share in shares]
        sampled = [self._live[share.id] for share in shares if share.sampled]
        try:
            logits = self._forward(shares, chunks)
            ends = list(itertools.accumulate(chunk.logits_to_keep for chunk in chunks))
            last = logits
            if len(sampled) < len(logits):
                last = logits[[end - 1 for end, share in zip(ends, shares, strict=True) if share.sampled]]
            chosen = sample(last, [answer.sampler for answer in sampled])
            told = _logprobs(sampled, chosen, last)
            for share, end in zip(shares, ends, strict=True):
                _note_prompt(self._live[share.id], share, logits[:end])
        except Exception as error:
            log.exception("the model failed", extra={"requests": [self._live[share.id].request.id for share in shares]})
            fault = EngineFault(f"The model failed in a step with {len(shares)} answers: {error!r}.")
            outputs += (self._end(share.id, FinishReason.ERROR, fault) for share in shares)
            return
        self._scheduler.commit(plan)
        outputs += map(self._next_token, sampled, chosen, told)

    def _slot_order(self, share: ScheduledChunk) -> int:
        slot = self._adapters.slot(self._live[share.id].request.version)
        return -1 if slot is None else slot.index

    def _chunk(self, share: ScheduledChunk) -> Chunk:
        answer = self._live[share.id]
        tokens = answer.sequence.tokens[share.start : share.start + share.count]
        return Chunk(tokens, share.start, answer.sequence.block_table, answer.logits_to_keep(share))

    def _forward(self, shares: list[ScheduledChunk], chunks: list[Chunk]) -> torch.Tensor:
        runs = [(self._adapters.slot(self._live[share.id].request.version), share.count) for share in shares]
        return self._model.forward(chunks, self._cache, self._adapters.slab, Batch.of(runs))

    def _next_token(self, answer: RequestState, token: int | None, logprobs: tuple[TokenLogprobs, ...]) -> Output:
        if answer.max_tokens == 0:
            return self._finish(answer, answer.output((), FinishReason.LENGTH))
        if token is None or answer.sampler.error is not None:
            return self._end(answer.sequence.id, FinishReason.ERROR, answer.sampler.error or _broken(answer))
        if token in answer.request.sampling_params.stop_ids:
            return self._finish(answer, answer.output((), FinishReason.STOP))
        answer.append(token)
        if answer.sampler.finished:
            return self._finish(answer, answer.output((token,), FinishReason.STOP, logprobs))
        if answer.is_full:
            return self._finish(answer, answer.output((token,), FinishReason.LENGTH, logprobs))
        return answer.output((token,), None, logprobs)

    def _end(self, number: int, finish: FinishReason, error: LoramillError | None = None) -> Output:
        """Ends an answer that got no token now."""
        answer = self._live[number]
        return self._finish(answer, Output(answer.request.id, (), finish, error, index=answer.index))

    def _finish(self, answer: RequestState, output: Output) -> Output:
        sequence = answer.sequence
        if sequence in self._scheduler.running:
            self._adapters.end_use(sequence.version)
        self._adapters.release(sequence.version)
        self._scheduler.remove(sequence.id)
        with self._changed:
            self._forget(answer)
        return output

    def _forget(self, answer: RequestState) -> None:
        del self._live[answer.sequence.id]
        open_ = self._requests[answer.request.id]
        open_.remove(answer.sequence.id)
        if not open_:
            del self._requests[answer.request.id]

    def _reset_after_fault(self, fault: EngineFault) -> list[Output]:
        """The books may be half written and nobody's state can be trusted: all end, and the books begin anew."""
        with self._changed:
            fresh = {item.sequence.id for item in self._inbox if isinstance(item, RequestState)}
            ended = [answer for number, answer in self._live.items() if number not in fresh]
            for answer in ended:
                self._forget(answer)
        # Not waiting for fetches: what they bring is of no use any more, and a slow one would hold up everybody.
        self._adapters.close(wait=False)
        self._keep_totals()
        # A GPU may have no room for two caches and two slabs. A slab is part of a cycle: its views know it.
        del self._cache, self._scheduler, self._adapters
        gc.collect()
        try:
            self._init_state()
        except Exception:
            with self._changed:
                self._closed = True
            raise
        return [Output(answer.request.id, (), FinishReason.ERROR, fault, index=answer.index) for answer in ended]

    def _count(self, plan: StepPlan, outputs: list[Output]) -> None:
        self._totals["steps"] += bool(plan.chunks)
        self._totals["computed_tokens"] += sum(share.count for share in plan.chunks)
        self._totals["generated_tokens"] += sum(len(output.tokens) for output in outputs)
        self._totals["preemptions"] += len(plan.preempted)

    def _note_wait(self, answer: RequestState) -> None:
        # One that was preempted has run before.
        if answer.waiting_since is not None:
            self._waits.observe(time.monotonic() - answer.waiting_since)
            answer.waiting_since = None

    def _keep_totals(self) -> None:
        """Adds what the books counted to the totals since the start."""
        self._totals["loads"] += self._adapters.loads
        self._totals["load_failures"] += self._adapters.load_failures
        self._totals["evictions"] += self._adapters.evictions
        self._totals["reused_tokens"] += self._scheduler.reused_tokens

    def _collect_stats(self) -> EngineStats:
        return EngineStats(
            waiting=self._scheduler.waiting,
            running=len(self._scheduler.running),
            pending_tokens=sum(answer.pending_tokens for answer in self._live.values()),
            blocks=self._scheduler.blocks,
            free_blocks=self._scheduler.free_blocks,
            slots=self._config.adapter_slots,
            resident=self._adapters.resident,
            loading=self._adapters.loading,
            adapter_bytes=self._adapters.slab.bytes,
            host_bytes=self._adapters.host_bytes,
            loads=self._totals["loads"] + self._adapters.loads,
            load_failures=self._totals["load_failures"] + self._adapters.load_failures,
            evictions=self._totals["evictions"] + self._adapters.evictions,
            queue_times=self._waits.durations,
            step_times=self._step_times.durations,
            load_times=self._load_times.durations,
            steps=self._totals["steps"],
            computed_tokens=self._totals["computed_tokens"],
            reused_tokens=self._totals["reused_tokens"] + self._scheduler.reused_tokens,
            generated_tokens=self._totals["generated_tokens"],
            preemptions=self._totals["preemptions"],
        )


def _logprobs(
    answers: list[RequestState], tokens: list[int | None], logits: torch.Tensor
) -> list[tuple[TokenLogprobs, ...]]:
    """What is told of each chosen token: one, or nothing where nobody asked."""
    asked = [
        (row, token, answer.request.sampling_params.logprobs)
        for row, (answer, token) in enumerate(zip(answers, tokens, strict=True))
        if answer.request.sampling_params.logprobs is not None and token is not None
    ]
    told: list[tuple[TokenLogprobs, ...]] = [()] * len(answers)
    if asked:
        rows, its, tops = zip(*asked, strict=True)
        for row, entry in zip(rows, token_logprobs(logits[list(rows)], its, tops), strict=True):
            told[row] = (entry,)
    return told


def _note_prompt(answer: RequestState, share: ScheduledChunk, logits: torch.Tensor) -> None:
    """Keeps the log probabilities of an echoed prompt's tokens; the share's rows are the last of the logits."""
    top = answer.request.sampling_params.logprobs
    if answer.logits_to_keep(share) == share.count and answer.echo_pending and top is not None:
        followers = answer.request.tokens[share.start + 1 : share.start + share.count + 1]
        rows = logits[len(logits) - share.count :][: len(followers)]
        # A preempted answer begins anew.
        answer.prompt_logprobs[share.start :] = token_logprobs(rows, followers, [top] * len(followers))


def _broken(answer: RequestState) -> LoramillError:
    version = answer.request.version
    if version is None:
        return EngineFault("The base gave logits that are no numbers.")
    return AdapterInvalid(f"Version {version} gives logits that are no numbers: its weights are broken.")


def _overloaded(waiting: int) -> LoramillError:
    return Overloaded(f"{waiting} requests are waiting already; try again after a moment.")


def _too_late(answer: RequestState) -> LoramillError:
    return DeadlineExceeded(
        f"The answer wasn't finished within its {answer.request.timeout_seconds} seconds; allow more, or try again "
        "later."
    )
