"""Continuous batching: many requests, many adapters, one forward pass per step."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch

from loramill.errors import AdapterInvalid, DeadlineExceeded, EngineFault, LoramillError, Unavailable
from loramill.kernels import Batch, Slot
from loramill.kernels.device import free_cached_memory
from loramill.kernels.memory import to_device
from loramill.serve.engine.adapters.manager import AdapterManager
from loramill.serve.engine.adapters.residency import Residency
from loramill.serve.engine.ahead import AheadPass, PendingTokens
from loramill.serve.engine.failures import FailureKind, ModelFailure, recover_from_out_of_memory
from loramill.serve.engine.request import RequestState
from loramill.serve.engine.request_table import RequestTable
from loramill.serve.engine.sampling.device_sampler import DeviceSampler
from loramill.serve.engine.sampling.logprobs import token_logprobs
from loramill.serve.engine.sampling.sampler import Sampler, sample
from loramill.serve.engine.scheduling.scheduler import ScheduledChunk, Scheduler, StepPlan
from loramill.serve.engine.scheduling.sequence import RunningSequence
from loramill.serve.engine.stats import Statistics
from loramill.serve.engine.step_batch import StepBatch
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
from loramill.serve.engine.warmup import DEFAULT_RANK, warm_up, warm_up_sampling
from loramill.serve.model import Chunk, Model

log = logging.getLogger(__name__)


#: An answer's next token (None: it has no valid one) and its log probabilities, if they were requested.
_SampledToken = tuple[int | None, tuple[TokenLogprobs, ...]]

#: In place of tokens that are still on the device.
_UNREAD = (0,)


class Engine:
    """Serves requests for one base and any number of its adapters.

    One thread calls `step` and `check_integrity`; any thread may call the rest.
    """

    def __init__(self, model: Model, source: AdapterSource, config: EngineConfig) -> None:
        self._model = model
        self._source = source
        self._config = config
        # Held during a step, so that nothing is closed or reset meanwhile.
        self._step_lock = threading.Lock()
        self._ids = itertools.count()
        self._requests = RequestTable(config.max_sequences, config.max_waiting)
        self._statistics = Statistics()
        self._outputs: list[Output] = []
        self._device_lost = False
        self._init_state()
        self._device = self._cache[0].keys.device
        self._last_stats = self._collect_stats()

    def _init_state(self) -> None:
        c = self._config
        # Made for the first logits of a model that is asynchronous.
        self._device_sampler: DeviceSampler | None = None
        self._ahead: AheadPass | None = None
        # The slots and the batch of the last pass ahead; the next one mostly has the same rows.
        self._ahead_slots: list[Slot | None] = []
        self._ahead_batch = Batch.of([])
        blocks = c.kv_tokens // c.block_size
        self._cache = self._model.new_cache(blocks, c.block_size)
        self._residency = Residency(c.adapter_slots, c.slot_patience_steps)
        self._adapters = AdapterManager(
            self._model, self._source, c, self._residency, self._requests.wake, self._statistics.load_times
        )
        self._scheduler = Scheduler(
            blocks,
            c.block_size,
            c.max_batch_tokens,
            c.max_sequences,
            rank_budget=c.rank_budget,
            rank_of=self._adapters.rank,
        )

    def warm_up(self, ranks: Sequence[int] = (DEFAULT_RANK,)) -> None:
        """Runs the model's first steps, which are slow, before the first request; to be called before `step`.

        Args:
            ranks: The ranks of adapters to expect, for which a GPU's kernels are compiled and its graphs captured.
        """
        with self._step_lock:
            warm_up(self._model, self._cache, self._adapters.slab, self._config, ranks)
            if self._model.asynchronous:
                self._device_sampler = DeviceSampler(self._model.vocabulary, self._device)
                warm_up_sampling(self._device_sampler, self._config.max_sequences, self._model.vocabulary, self._device)
            self._adapters.wait_until_prepared()

    def submit(self, request: Request) -> None:
        """Accepts a request; its outputs come from `step`.

        Raises:
            InvalidRequest: A field is invalid.
            ContextLengthExceeded: The prompt leaves no room for an answer.
            Conflict: A request with this id is being served.
            Overloaded: Too many requests are waiting.
            Unavailable: The engine is closed.
        """
        self._requests.submit(request, self._new_states(request))

    def cancel(self, request_id: str) -> None:
        """Ends a request in the next step, with an output CANCELLED per answer; does nothing if it has ended."""
        self._requests.cancel(request_id)

    @property
    def has_work(self) -> bool:
        """Whether a step may have something to do now; False also while requests wait for adapters being fetched."""
        return self._requests.has_work

    def wait(self, timeout: float) -> bool:
        """Blocks until a step may have something to do, at most `timeout` seconds; returns whether it has."""
        return self._requests.wait(timeout)

    @property
    def device_lost(self) -> bool:
        """Whether the device has failed for good; the engine is then closed, and its process has to be replaced."""
        return self._device_lost

    @property
    def stats(self) -> EngineStats:
        """The state after the last step; `waiting` and `pending_tokens` include requests submitted since."""
        stats = self._last_stats
        waiting = max(0, len(self._requests) - stats.running)
        return replace(stats, waiting=waiting, pending_tokens=self._requests.pending_tokens)

    def step(self) -> list[Output]:
        """Processes what was submitted, cancelled and loaded, then runs the model once.

        Never raises for what a request or an adapter does: that request gets an output with an error, and the engine
        continues. After a failure of the device, all answers end with an error, and `device_lost` is true. It raises if
        not even the cache can be allocated again after a fault; then the engine is closed.
        """
        with self._step_lock:
            if self._requests.closed:
                return []
            failure: ModelFailure | None = None
            try:
                self._step()
            except Exception as error:
                log.exception("a step failed outside the model")
                failure = ModelFailure.of(error, self._device)
            # By now the exception is gone, and with it the references of its frames to the old state.
            if failure is not None and failure.kind is FailureKind.DEVICE_LOST:
                self._give_up(failure)
            elif failure is not None:
                self._reset_after_fault(EngineFault(f"A step failed: {failure.message}."))
            outputs, self._outputs = self._outputs, []
            if outputs or self._scheduler.has_running:
                self._requests.wake()
            self._last_stats = self._collect_stats()
            return outputs

    def _step(self) -> None:
        self._drain_inbox()
        batch = self._schedule()
        started = time.perf_counter()
        plan = self._compute(batch)
        self._statistics.count_step(plan, self._outputs, time.perf_counter() - started)

    def check_integrity(self) -> None:
        """Checks requests, scheduler and adapters against each other; may be called between any two steps.

        Raises:
            EngineFault: They are inconsistent.
        """
        self._scheduler.check_integrity()
        users = Counter(s.version for s in self._scheduler.sequences if s.version is not None)
        in_use = Counter(s.version for s in self._scheduler.running if s.version is not None)
        self._residency.check_integrity(dict(users), dict(in_use))
        self._adapters.check_integrity()
        self._requests.check_integrity(s.id for s in self._scheduler.sequences)

    def close(self) -> None:
        """Refuses further requests and ends the loader's threads; live requests get no further output.

        Waits for the step and the fetches that have begun.
        """
        with self._step_lock:
            if not self._requests.close():
                self._adapters.close()

    def _new_states(self, request: Request) -> list[RequestState]:
        c, params = self._config, request.sampling_params
        max_tokens = answer_limit(
            request,
            vocabulary=self._model.vocabulary,
            context_length=self._model.context_length,
            kv_tokens=c.kv_tokens // c.block_size * c.block_size,
        )
        # An echo with log probabilities needs the logits of every position, which no cache holds.
        use_prefix_cache = c.prefix_cache and not (params.echo and params.logprobs is not None)
        return [
            RequestState(
                request,
                index,
                RunningSequence(
                    next(self._ids),
                    request.tenant,
                    request.version,
                    list(request.tokens),
                    priority=request.priority,
                    use_prefix_cache=use_prefix_cache,
                ),
                Sampler(params, request.tokens, index, request.mask() if request.mask is not None else None),
                max_tokens,
                params.echo,
            )
            for index in range(params.n)
        ]

    def _drain_inbox(self) -> None:
        """Processes what other threads have done since the last step."""
        for item in self._requests.drain_inbox():
            if isinstance(item, RequestState):
                self._scheduler.add(item.sequence)
                self._residency.acquire(item.version)
            else:
                known = [id_ for id_ in self._requests.ids_of(item) if id_ in self._scheduler]
                self._end(known, FinishReason.CANCELLED)
        if victims := self._requests.overload_victims(self._scheduler):
            self._end(victims, FinishReason.ERROR, self._requests.overloaded())
        for id_ in self._requests.take_overdue(self._scheduler):
            self._end([id_], FinishReason.ERROR, _too_late(self._requests[id_]))
        for version, error in self._adapters.collect_loaded():
            waiting = [sequence.id for sequence in self._scheduler.sequences if sequence.version == version]
            self._end(waiting, FinishReason.ERROR, error)
        self._adapters.advance()

    def _schedule(self) -> StepBatch:
        """Decides what runs."""
        plan = self._scheduler.schedule(self._residency.ready)
        for id_ in plan.admitted:
            state = self._requests[id_]
            self._residency.begin_use(state.version)
            self._statistics.count_start(state)
        for id_ in plan.preempted:
            self._residency.end_use(self._requests[id_].version)
        # Sorted by adapter, so that each adapter's rows are adjacent.
        pairs = sorted(((self._requests[chunk.id], chunk) for chunk in plan.chunks), key=self._slot_index)
        return StepBatch.of(plan, pairs)

    def _slot_index(self, pair: tuple[RequestState, ScheduledChunk]) -> int:
        slot = self._adapters.slot(pair[0].version)
        return -1 if slot is None else slot.index

    def _compute(self, batch: StepBatch) -> StepPlan:
        """Runs the batch, or what memory suffices for, and puts out its tokens; returns the plan of what ran."""
        first = True
        while batch.chunks:
            failure = self._attempt(batch)
            if failure is None:
                break
            if failure.kind is FailureKind.DEVICE_LOST:
                self._give_up(failure)
                break
            if failure.kind is FailureKind.STEP:
                fault = EngineFault(f"The model failed in a step with {len(batch.states)} answers: {failure.message}.")
                self._end([state.id for state in batch.states], FinishReason.ERROR, fault)
                break
            batch, first = self._reduced(batch, first), False
        return batch.plan

    def _attempt(self, batch: StepBatch) -> ModelFailure | None:
        """Runs the batch and puts out its tokens, unless the model or the sampling fails."""
        try:
            logits = self._run(batch)
            tokens = self._sample(batch, logits)
        except Exception as error:
            log.exception("the model failed", extra={"requests": [state.request.id for state in batch.states]})
            self._ahead = None  # its positions follow tokens that were not put out
            return ModelFailure.of(error, self._device)
        self._emit(batch, tokens)
        return None

    def _run(self, batch: StepBatch) -> torch.Tensor:
        """Runs the model; returns float32 logits [sum of `logits_to_keep`, vocabulary]."""
        ahead, self._ahead = self._ahead, None
        steps = zip(batch.states, batch.chunks, batch.logits_to_keep, strict=True)
        if ahead is None:
            return self._forward(steps)
        rows = [ahead.row(chunk, state.sequence) for state, chunk in zip(batch.states, batch.chunks, strict=True)]
        rest = [step for step, row in zip(steps, rows, strict=True) if row is None] if None in rows else []
        if len(rest) == len(rows):
            return self._forward(rest)
        return ahead.merge(rows, batch.logits_to_keep, self._forward(rest) if rest else None)

    def _forward(self, steps: Iterable[tuple[RequestState, ScheduledChunk, int]]) -> torch.Tensor:
        chunks, runs = [], []
        for state, chunk, keep in steps:
            tokens = state.sequence.tokens[chunk.start : chunk.start + chunk.count]
            chunks.append(Chunk(tokens, chunk.start, state.sequence.block_table, keep))
            runs.append((self._adapters.slot(state.version), chunk.count))
        return self._model.forward(chunks, self._cache, self._adapters.slab, Batch.of(runs))

    def _run_ahead(self, batch: StepBatch, tokens: torch.Tensor) -> None:
        """Launches the next decode of the answers that get these tokens, int64 [rows], which are still on the device.

        Only if all answers decode next and none waits, since a prompt that starts costs a pass of its own then. Only if
        no log probabilities are read, for they would wait for the pass.
        """
        if self._scheduler.waiting or len(batch.sampled) < len(self._scheduler.running):
            return
        if any(state.request.sampling_params.logprobs is not None for state in batch.sampled):
            return
        states = [state for state in batch.sampled if not state.is_full_with_next]
        sequences = [state.sequence for state in states]
        if not states or not self._scheduler.allocate_ahead(sequences):
            return
        chunks = [Chunk(_UNREAD, len(s.tokens), s.block_table, 1) for s in sequences]
        slots = [self._adapters.slot(state.version) for state in states]
        if slots != self._ahead_slots:
            self._ahead_slots, self._ahead_batch = slots, Batch.of((slot, 1) for slot in slots)
        if len(states) < len(tokens):
            tokens = _rows(tokens, [row for row, s in enumerate(batch.sampled) if not s.is_full_with_next])
        # An answer without a valid token ends.
        logits = self._model.forward(chunks, self._cache, self._adapters.slab, self._ahead_batch, tokens.clamp(min=0))
        self._ahead = AheadPass({s.id: (row, chunks[row]) for row, s in enumerate(sequences)}, logits)

    def _sample(self, batch: StepBatch, logits: torch.Tensor) -> list[_SampledToken]:
        """Samples a token for each of `batch.sampled`, and keeps the log probabilities of echoed prompts."""
        ends = list(itertools.accumulate(batch.logits_to_keep))
        last = logits
        if len(batch.sampled) < len(logits):
            last = _rows(logits, [end - 1 for end, chunk in zip(ends, batch.chunks, strict=True) if chunk.sampled])
        tokens = self._sample_tokens(batch, last)
        logprobs = _logprobs(batch.sampled, tokens, last)
        for chunk, state, end in zip(batch.chunks, batch.states, ends, strict=True):
            if state.echo_pending:
                state.add_prompt_logprobs(chunk, logits, end)
        return list(zip(tokens, logprobs, strict=True))

    def _sample_tokens(self, batch: StepBatch, logits: torch.Tensor) -> list[int | None]:
        samplers = [state.sampler for state in batch.sampled]
        if not self._model.asynchronous:
            return sample(logits, samplers)
        if self._device_sampler is None:
            self._device_sampler = DeviceSampler(self._model.vocabulary, logits.device)
        tokens = self._device_sampler.sample(logits, samplers)
        pending = PendingTokens(tokens)
        self._run_ahead(batch, tokens)
        # Here the host waits for the device, once per step.
        return pending.read()

    def _emit(self, batch: StepBatch, tokens: Sequence[_SampledToken]) -> None:
        """Records the step and puts out the sampled tokens."""
        self._scheduler.commit(batch.plan)
        self._outputs += map(self._next_output, batch.sampled, tokens)

    def _reduced(self, batch: StepBatch, first: bool) -> StepBatch:
        """The part of a batch to retry after memory ran out; ends an answer if it must."""
        free_cached_memory(self._device)
        recovery = recover_from_out_of_memory(
            [chunk.id for chunk in batch.chunks], [_is_decode(chunk) for chunk in batch.chunks], first=first
        )
        if recovery.ended is not None:
            state, count = batch.states[recovery.ended], len(batch.chunks)
            error = Unavailable(
                f"The GPU had no memory for this request of {len(state.sequence.tokens)} tokens in a step with {count} "
                "answers. Try again later; if it persists, lower serve.kv_tokens or serve.max_batch_tokens."
            )
            self._end([state.id], FinishReason.ERROR, error)
        return batch.part(recovery.retried)

    def _give_up(self, failure: ModelFailure) -> None:
        """Ends all answers and closes the engine: its device does not compute any more."""
        self._device_lost = True
        self._requests.close()
        self._requests.drain_inbox()
        self._adapters.close(wait=False)
        error = Unavailable(f"The GPU of this replica failed, and the replica is being replaced: {failure.message}.")
        self._outputs += (_failed(state, error) for state in self._requests.remove_drained())

    def _next_output(self, state: RequestState, sampled: _SampledToken) -> Output:
        token, logprobs = sampled
        if state.max_tokens == 0:
            return self._finish(state, state.output((), FinishReason.LENGTH))
        if token is None or state.sampler.error is not None:
            return self._finish(state, _failed(state, state.sampler.error or _not_finite(state)))
        if token in state.request.sampling_params.stop_ids:
            return self._finish(state, state.output((), FinishReason.STOP))
        state.append(token)
        if state.sampler.finished:
            return self._finish(state, state.output((token,), FinishReason.STOP, logprobs))
        if state.is_full:
            return self._finish(state, state.output((token,), FinishReason.LENGTH, logprobs))
        return state.output((token,), None, logprobs)

    def _end(self, ids: Iterable[int], reason: FinishReason, error: LoramillError | None = None) -> None:
        """Ends answers without a further token."""
        for id_ in ids:
            state = self._requests[id_]
            output = Output(state.request.id, (), reason, error, index=state.index)
            self._outputs.append(self._finish(state, output))

    def _finish(self, state: RequestState, output: Output) -> Output:
        """Removes an answer that has its last output, which is returned."""
        sequence = state.sequence
        if self._scheduler.is_running(sequence):
            self._residency.end_use(sequence.version)
        self._residency.release(sequence.version)
        self._scheduler.remove(sequence.id)
        self._requests.remove(state)
        return output

    def _reset_after_fault(self, fault: EngineFault) -> None:
        """Ends all answers and starts again with new state: the old state may be half written."""
        ended = self._requests.remove_drained()
        # Does not wait for fetches: their results are of no use, and a slow one would hold up all requests.
        self._adapters.close(wait=False)
        self._statistics.carry_over(self._scheduler, self._adapters)
        # A GPU may have no room for two caches and two slabs.
        self._adapters.slab.close()
        del self._cache, self._scheduler, self._residency, self._adapters
        try:
            self._init_state()
        except Exception:
            self._requests.close()
            raise
        self._outputs += (_failed(state, fault) for state in ended)

    def _collect_stats(self) -> EngineStats:
        return self._statistics.snapshot(self._scheduler, self._residency, self._adapters, self._model.failed_captures)


def _is_decode(chunk: ScheduledChunk) -> bool:
    return chunk.count == 1 and chunk.sampled


def _logprobs(
    states: Sequence[RequestState], tokens: Sequence[int | None], logits: torch.Tensor
) -> list[tuple[TokenLogprobs, ...]]:
    """The log probabilities of each sampled token: one, or none if they were not requested."""
    requested = [
        (row, token, state.request.sampling_params.logprobs)
        for row, (state, token) in enumerate(zip(states, tokens, strict=True))
        if state.request.sampling_params.logprobs is not None and token is not None
    ]
    logprobs: list[tuple[TokenLogprobs, ...]] = [()] * len(states)
    if requested:
        rows, chosen, tops = zip(*requested, strict=True)
        for row, entry in zip(rows, token_logprobs(_rows(logits, rows), chosen, tops), strict=True):
            logprobs[row] = (entry,)
    return logprobs


def _rows(logits: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    return logits[to_device(np.array(rows, np.int64), logits.device)]


def _failed(state: RequestState, error: LoramillError) -> Output:
    return Output(state.request.id, (), FinishReason.ERROR, error, index=state.index)


def _not_finite(state: RequestState) -> LoramillError:
    if state.version is None:
        return EngineFault("The base's logits are not finite.")
    return AdapterInvalid(f"Version {state.version} produces logits that are not finite: its weights are broken.")


def _too_late(state: RequestState) -> LoramillError:
    return DeadlineExceeded(
        f"The answer wasn't finished within its {state.request.timeout_seconds} seconds; allow more, or try again "
        "later."
    )
