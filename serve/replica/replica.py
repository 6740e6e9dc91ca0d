"""An engine replica: one base model, one engine, one thread that steps it. Text in, text out; no HTTP, no Ray."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from loramill.data.tokenizer import ChatTokenizer
from loramill.errors import Conflict, ContextLengthExceeded, InvalidRequest, Unavailable
from loramill.gpus.process import free_bytes, open_gpu
from loramill.local.machine import free_memory
from loramill.models.catalog import Base, nf4_source
from loramill.serve.engine import (
    AdapterSource,
    Engine,
    EngineConfig,
    EngineStats,
    Output,
    Request,
    TokenMask,
)
from loramill.serve.engine.warmup import DEFAULT_RANK
from loramill.serve.model import load_model
from loramill.serve.protocol import TextChunk, TextRequest
from loramill.serve.replica.masks import ConstraintCompiler
from loramill.serve.replica.output_assembler import OutputAssembler
from loramill.settings import ServeSettings
from loramill.sizing import anatomy, read_config
from loramill.sizing.serving import EngineLimits, cpu_limits, gpu_limits
from loramill.types import GpuInfo

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _OutputQueue:
    """A request's outputs, in the event loop that submitted it."""

    loop: asyncio.AbstractEventLoop
    outputs: asyncio.Queue[Output] = field(default_factory=asyncio.Queue)

    async def next_outputs(self) -> list[Output]:
        """Waits for an output; returns all that are ready, which become one chunk."""
        ready = [await self.outputs.get()]
        while not self.outputs.empty():
            ready.append(self.outputs.get_nowait())
        return ready


def resolve_device(settings: ServeSettings) -> str:
    """Resolves "auto" to a device of this process: "cpu" or "cuda"."""
    if settings.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return settings.device


def engine_config(settings: ServeSettings, limits: EngineLimits) -> EngineConfig:
    """The configuration of an engine."""
    return EngineConfig(
        max_batch_tokens=limits.max_batch_tokens,
        max_sequences=settings.max_sequences,
        kv_tokens=limits.kv_tokens,
        prefix_cache=settings.prefix_cache,
        adapter_slots=settings.adapter_slots,
        adapter_bytes=limits.adapter_bytes,
        adapter_bits=settings.adapter_bits,
        host_bytes=limits.host_bytes,
        rank_budget=settings.rank_budget,
        max_waiting=limits.max_waiting,
    )


def _gpu_limits(gpu: GpuInfo, base: Base, settings: ServeSettings) -> EngineLimits:
    """The limits on the GPU of this process, to which the base has been loaded."""
    share, host = settings.gpu_fraction or 1.0, free_memory()
    return gpu_limits(
        gpu,
        anatomy(read_config(str(base.folder))),
        settings.served_quantization(base.quantization),
        settings,
        free_bytes=free_bytes(share, torch.device("cuda", torch.cuda.current_device())),
        host_free_bytes=0 if host is None else host.free_bytes,
    )


class Replica:
    """Answers text requests with the base and any adapter; a `GenerationBackend` for the gateway.

    Attributes:
        expected_tokens_per_second: speed of the engine under full load, until it is measured.
    """

    def __init__(
        self,
        base: Base,
        source: AdapterSource,
        settings: ServeSettings,
        *,
        cache: Path | None = None,
        ranks: Sequence[int] = (),
    ) -> None:
        """
        Args:
            base: the base to serve.
            source: fetches the folder of an adapter's version.
            settings: the engine's settings.
            cache: folder for weights in NF4 (`loramill.models.nf4_cache`); None: each start quantizes them.
            ranks: ranks of adapters to expect, in addition to the default one; see `Engine.warm_up`.
        """
        self._context_length = base.context_length
        self._tokenizer = ChatTokenizer.load(base.folder)
        device = resolve_device(settings)
        gpu = open_gpu(settings.gpu_fraction or 1.0) if device == "cuda" else None
        self._stuck_seconds = settings.stuck_seconds
        self._last_step = time.monotonic()
        model = load_model(
            base.folder,
            dtype=torch.bfloat16,
            quantization=settings.served_quantization(base.quantization),
            threads=settings.threads,
            device=device,
            nf4_source=nf4_source(base, torch.device(device), cache),
        )
        limits = cpu_limits(settings) if gpu is None else _gpu_limits(gpu, base, settings)
        log.info("engine on %s: %s", gpu or "the CPU", limits)
        self.expected_tokens_per_second = limits.tokens_per_second
        self._engine = Engine(model, source, engine_config(settings, limits))
        self._engine.warm_up((DEFAULT_RANK, *ranks))
        self._constraints = ConstraintCompiler(self._tokenizer, model.vocabulary)
        self._queues: dict[str, _OutputQueue] = {}
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    async def generate(self, request: TextRequest) -> AsyncGenerator[TextChunk, None]:
        """Streams one answer; tokens that are ready together are one chunk. Closing the iterator cancels the request.

        Raises:
            Conflict, ContextLengthExceeded, InvalidRequest, Overloaded: before anything is generated.
            LoramillError: from the engine, such as an adapter that cannot be loaded.
        """
        tokens = self._prompt_tokens(request)
        mask = await self._constraints.mask_factory(request.constraint) if request.constraint else None
        if request.id in self._queues:
            raise Conflict(f"A request with the id {request.id} is in flight; ids must differ.")
        queue = self._queues[request.id] = _OutputQueue(asyncio.get_running_loop())
        assembler = OutputAssembler(self._tokenizer, request, len(tokens))
        try:
            self._engine.submit(self._engine_request(request, tokens, mask))
            finished = False
            while not finished:
                if chunk := assembler.push(await queue.next_outputs()):
                    yield chunk
                    finished = chunk.finish is not None
        finally:
            self._engine.cancel(request.id)
            del self._queues[request.id]

    async def ready(self) -> None:
        """Raises Unavailable if the engine's thread has ended or hangs in a step."""
        if not self._thread.is_alive():
            raise Unavailable("The engine of this replica has stopped; it is being replaced, try again in a moment.")
        if (silent := time.monotonic() - self._last_step) > self._stuck_seconds:
            raise Unavailable(f"The engine of this replica has hung for {silent:.0f} s; it is being replaced.")

    def stats(self) -> EngineStats:
        """The engine's current statistics."""
        return self._engine.stats

    def close(self) -> None:
        """Stops the engine's threads; requests in flight get no more tokens."""
        self._closing.set()
        self._thread.join()
        self._engine.close()
        self._constraints.close()

    def _prompt_tokens(self, request: TextRequest) -> list[int]:
        if request.messages:
            return self._tokenizer.encode_chat(request.messages, request.tools)
        if isinstance(request.prompt, str):
            return self._tokenizer.encode_text(request.prompt)
        if not request.prompt:
            raise InvalidRequest("The prompt is empty; send at least one token.", param="prompt")
        if any(not 0 <= token < self._tokenizer.vocabulary_size for token in request.prompt):
            raise InvalidRequest(
                f"The prompt contains a token id outside of 0 to {self._tokenizer.vocabulary_size - 1}.", param="prompt"
            )
        return list(request.prompt)

    def _engine_request(self, request: TextRequest, tokens: list[int], mask: Callable[[], TokenMask] | None) -> Request:
        available = self._context_length - len(tokens)
        if available < 1:
            raise ContextLengthExceeded(
                f"The prompt has {len(tokens)} tokens and the base reads {self._context_length}: shorten the prompt.",
                param="messages" if request.messages else "prompt",
            )
        params = request.sampling_params
        if params.n != 1:
            raise InvalidRequest("A request to a replica has one answer; send one request per answer.", param="n")
        if not request.ignore_eos:
            params = replace(params, stop_ids=self._tokenizer.stop_ids)
        elif mask is not None:
            # Under a constraint, stop tokens are never text: they are postponed as long as anything else can follow.
            min_tokens = available if params.max_tokens is None else params.max_tokens
            params = replace(params, stop_ids=self._tokenizer.stop_ids, min_tokens=min_tokens)
        return Request(request.id, request.tenant, tuple(tokens), params, request.version, request.priority, mask=mask)

    def _run(self) -> None:
        # Once this thread has ended, `ready` raises and the replica is replaced.
        while not self._closing.is_set() and not self._engine.device_lost:
            outputs = self._engine.step() if self._engine.wait(timeout=0.5) else []
            self._last_step = time.monotonic()
            self._deliver(outputs)

    def _deliver(self, outputs: Sequence[Output]) -> None:
        """Passes a step's outputs to their event loops, in one call per loop, so that they leave in one frame."""
        ready: dict[asyncio.AbstractEventLoop, list[tuple[_OutputQueue, Output]]] = {}
        for output in outputs:
            if queue := self._queues.get(output.request_id):
                ready.setdefault(queue.loop, []).append((queue, output))
        for loop, pairs in ready.items():
            loop.call_soon_threadsafe(_put_outputs, pairs)


def _put_outputs(outputs: Sequence[tuple[_OutputQueue, Output]]) -> None:
    for queue, output in outputs:
        queue.outputs.put_nowait(output)
