"""Runs the model on the batch of a step, and samples the next tokens of its answers."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from loramill.kernels import Batch, LayerKV, Slot
from loramill.kernels.memory import to_device
from loramill.serve.engine.adapters.manager import AdapterManager
from loramill.serve.engine.ahead import AheadPass, PendingTokens
from loramill.serve.engine.request import RequestState
from loramill.serve.engine.sampling.device_sampler import DeviceSampler
from loramill.serve.engine.sampling.logprobs import token_logprobs
from loramill.serve.engine.sampling.sampler import sample
from loramill.serve.engine.scheduling.scheduler import ScheduledChunk, Scheduler
from loramill.serve.engine.step_batch import StepBatch
from loramill.serve.engine.types import EngineConfig, TokenLogprobs
from loramill.serve.engine.warmup import warm_up, warm_up_sampling
from loramill.serve.model import Chunk, Model

#: An answer's next token (None: it has no valid one) and its log probabilities, if they were requested.
NextToken = tuple[int | None, tuple[TokenLogprobs, ...]]

#: In place of tokens that are still on the device.
_UNREAD = (0,)


class ModelRunner:
    """A model with its KV cache.

    If the model is asynchronous, tokens are sampled on its device, and the next decodes are launched before the host
    reads them.

    Attributes:
        device: The device of the cache and the logits.
    """

    def __init__(self, model: Model, cache: Sequence[LayerKV], adapters: AdapterManager, scheduler: Scheduler) -> None:
        """
        Args:
            model: The model.
            cache: Its KV cache, whose blocks `scheduler` allocates.
            adapters: The slab and the slots of the versions in it.
            scheduler: Allocates blocks for decodes that run ahead.
        """
        self.device = cache[0].keys.device
        self._model = model
        self._cache = cache
        self._adapters = adapters
        self._scheduler = scheduler
        # Made for the first logits of a model that is asynchronous.
        self._device_sampler: DeviceSampler | None = None
        self._ahead: AheadPass | None = None
        # The slots and the batch of the last pass ahead; the next one mostly has the same rows.
        self._ahead_slots: list[Slot | None] = []
        self._ahead_batch = Batch.of([])

    def warm_up(self, config: EngineConfig, ranks: Sequence[int]) -> None:
        """Runs the first steps, which are slow, with adapters of these ranks."""
        warm_up(self._model, self._cache, self._adapters.slab, config, ranks)
        if self._model.asynchronous:
            self._device_sampler = DeviceSampler(self._model.vocabulary, self.device)
            warm_up_sampling(self._device_sampler, config.max_sequences, self._model.vocabulary, self.device)

    def run(self, batch: StepBatch) -> list[NextToken]:
        """Computes a batch; returns the next token of each of `batch.sampled`.

        Keeps the log probabilities of echoed prompts. Raises what the model or the sampling raises.
        """
        try:
            return self._sample(batch, self._compute_logits(batch))
        except Exception:
            self._ahead = None  # its positions follow tokens that are not put out
            raise

    def _compute_logits(self, batch: StepBatch) -> torch.Tensor:
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

    def _sample(self, batch: StepBatch, logits: torch.Tensor) -> list[NextToken]:
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
