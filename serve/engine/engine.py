"""Continuous batching: many requests, many adapters, one forward pass per step."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

from loramill.errors import DeadlineExceeded, EngineFault, LoramillError, Unavailable
from loramill.kernels.device import free_cached_memory
from loramill.serve.engine.adapters.manager import AdapterManager
from loramill.serve.engine.adapters.residency import Residency
from loramill.serve.engine.failures import FailureKind, ModelFailure, recover_from_out_of_memory
from loramill.serve.engine.model_runner import ModelRunner, NextToken
from loramill.serve.engine.request import RequestState
from loramill.serve.engine.request_table import RequestTable
from loramill.serve.engine.sampling.sampler import Sampler
from loramill.serve.engine.scheduling.scheduler import ScheduledChunk, Scheduler, StepPlan
from loramill.serve.engine.scheduling.sequence import RunningSequence
from loramill.serve.engine.stats import Statistics
from loramill.serve.engine.step_batch import StepBatch
from loramill.serve.engine.types import AdapterSource, EngineConfig, EngineStats, FinishReason, Output, Request
from loramill.serve.engine.validation import answer_limit
from loramill.serve.engine.warmup import DEFAULT_RANK
from loramill.serve.model import Model

log = logging.getLogger(__name__)


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
        self._device = self._runner.device
        self._last_stats = self._collect_stats()

    def _init_state(self) -> None:
        c = self._config
        blocks = c.kv_tokens // c.block_size
        cache = self._model.new_cache(blocks, c.block_size)
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
        self._runner = ModelRunner(self._model, cache, self._adapters, self._scheduler)

    def warm_up(self, ranks: Sequence[int] = (DEFAULT_RANK,)) -> None:
        """Runs the model's first steps, which are slow, before the first request; to be called before `step`.

        Args:
            ranks: The ranks of adapters to expect, for which a GPU's kernels are compiled and its graphs captured.
        """
        with self._step_lock:
            self._runner.warm_up(self._config, ranks)
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
            tokens = self._runner.run(batch)
        except Exception as error:
            log.exception("the model failed", extra={"requests": [state.request.id for state in batch.states]})
            return ModelFailure.of(error, self._device)
        self._emit(batch, tokens)
        return None

    def _emit(self, batch: StepBatch, tokens: Sequence[NextToken]) -> None:
        """Records the step and puts out the sampled tokens."""
        self._scheduler.commit(batch.plan)
        for state, (token, logprobs) in zip(batch.sampled, tokens, strict=True):
            output = state.add(token, logprobs)
            if output.finish_reason is not None:
                self._remove(state)
            self._outputs.append(output)

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
        self._outputs += (state.end(FinishReason.ERROR, error) for state in self._requests.remove_drained())

    def _end(self, ids: Iterable[int], reason: FinishReason, error: LoramillError | None = None) -> None:
        """Ends answers without a further token."""
        for id_ in ids:
            state = self._requests[id_]
            self._remove(state)
            self._outputs.append(state.end(reason, error))

    def _remove(self, state: RequestState) -> None:
        """Removes an answer that has its last output."""
        sequence = state.sequence
        if self._scheduler.is_running(sequence):
            self._residency.end_use(sequence.version)
        self._residency.release(sequence.version)
        self._scheduler.remove(sequence.id)
        self._requests.remove(state)

    def _reset_after_fault(self, fault: EngineFault) -> None:
        """Ends all answers and starts again with new state: the old state may be half written."""
        ended = self._requests.remove_drained()
        # Does not wait for fetches: their results are of no use, and a slow one would hold up all requests.
        self._adapters.close(wait=False)
        self._statistics.carry_over(self._scheduler, self._adapters)
        # A GPU may have no room for two caches and two slabs.
        self._adapters.slab.close()
        del self._runner, self._scheduler, self._residency, self._adapters
        try:
            self._init_state()
        except Exception:
            self._requests.close()
            raise
        self._outputs += (state.end(FinishReason.ERROR, fault) for state in ended)

    def _collect_stats(self) -> EngineStats:
        return self._statistics.snapshot(self._scheduler, self._residency, self._adapters, self._model.failed_captures)


def _is_decode(chunk: ScheduledChunk) -> bool:
    return chunk.count == 1 and chunk.sampled


def _too_late(state: RequestState) -> LoramillError:
    return DeadlineExceeded(
        f"The answer wasn't finished within its {state.request.timeout_seconds} seconds; allow more, or try again "
        "later."
    )
