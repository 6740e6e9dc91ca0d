"""An engine replica: one base model, one engine, one thread that steps it. Text in, text out; no HTTP, no Ray."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field

import torch

from loramill.data.token_bytes import TokenBytes
from loramill.data.tokenizer import ChatTokenizer, IncrementalDecoder
from loramill.errors import Conflict, ContextLengthExceeded, InvalidRequest, Unavailable
from loramill.models.catalog import Base
from loramill.serve.engine import (
    AdapterSource,
    Engine,
    EngineConfig,
    EngineStats,
    FinishReason,
    Output,
    Request,
    SamplingParams,
    TokenMask,
)
from loramill.serve.engine import TokenLogprobs as EngineLogprobs
from loramill.serve.model import load_model
from loramill.serve.protocol import SampledToken, TextChunk, TextRequest, TokenText
from loramill.serve.replica.masks import ConstraintCompiler
from loramill.serve.replica.stop_strings import StopScanner
from loramill.settings import ServeSettings

#: Tokens of one engine step, by device. On a CPU more make answers come in larger jerks, and no faster; a GPU that gets
#: fewer waits for its memory.
_DEFAULT_BATCH_TOKENS = {"cpu": 128, "cuda": 2048}


@dataclass(frozen=True, slots=True)
class _OutputQueue:
    """Where a request's outputs go: a queue in the event loop that asked."""

    loop: asyncio.AbstractEventLoop
    outputs: asyncio.Queue[Output] = field(default_factory=asyncio.Queue)

    async def next_outputs(self) -> list[Output]:
        """All outputs that are ready, at least one: they travel on as one chunk."""
        ready = [await self.outputs.get()]
        while not self.outputs.empty():
            ready.append(self.outputs.get_nowait())
        return ready


def resolve_device(settings: ServeSettings) -> str:
    """The device that the settings mean in this process: "cpu" or "cuda"."""
    if settings.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return settings.device


class Replica:
    """Answers text requests with the base and any adapter; a `Backend` for the gateway."""

    def __init__(self, base: Base, source: AdapterSource, settings: ServeSettings) -> None:
        self._context_length = base.context_length
        self._tokenizer = ChatTokenizer.load(base.folder)
        device = resolve_device(settings)
        config = EngineConfig(
            max_batch_tokens=settings.max_batch_tokens or _DEFAULT_BATCH_TOKENS[device],
            max_sequences=settings.max_sequences,
            kv_tokens=settings.kv_tokens,
            prefix_cache=settings.prefix_cache,
            adapter_slots=settings.adapter_slots,
            adapter_bytes=settings.adapter_bytes,
            adapter_bits=settings.adapter_bits,
            host_bytes=settings.host_bytes,
            rank_budget=settings.rank_budget,
            max_waiting=settings.max_waiting,
        )
        self._stuck_seconds = settings.stuck_seconds
        self._last_step = time.monotonic()
        model = load_model(
            base.folder,
            dtype=torch.bfloat16,
            quantization=base.quantization,
            threads=settings.threads,
            device=device,
        )
        self._engine = Engine(model, source, config)
        self._engine.warm_up()
        self._constraints = ConstraintCompiler(self._tokenizer, model.vocabulary)
        self._queues: dict[str, _OutputQueue] = {}
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    async def generate(self, request: TextRequest) -> AsyncGenerator[TextChunk, None]:
        """Streams one answer; what is ready together is one chunk. Closing the iterator cancels the request.

        Raises:
            Conflict, ContextLengthExceeded, InvalidRequest, Overloaded: before anything is generated.
            LoramillError: what the engine met with, such as an adapter that can't be loaded.
        """
        tokens = self._prompt_tokens(request)
        mask = await self._constraints.mask_factory(request.constraint) if request.constraint else None
        if request.id in self._queues:
            raise Conflict(f"A request with the id {request.id} is being served; ids must differ.")
        listener = _OutputQueue(asyncio.get_running_loop())
        self._queues[request.id] = listener
        try:
            self._engine.submit(self._engine_request(request, tokens, mask))
            async for chunk in self._chunks(request, listener, len(tokens)):
                yield chunk
        finally:
            self._engine.cancel(request.id)
            del self._queues[request.id]

    async def ready(self) -> None:
        """Raises Unavailable when the engine's thread has ended, or hangs in a step."""
        if not self._thread.is_alive():
            raise Unavailable("The engine of this replica has stopped; it is being replaced, try again in a moment.")
        if (silent := time.monotonic() - self._last_step) > self._stuck_seconds:
            raise Unavailable(f"The engine of this replica has hung for {silent:.0f} s; it is being replaced.")

    def stats(self) -> EngineStats:
        """What the engine is doing now."""
        return self._engine.stats

    def close(self) -> None:
        """Ends the engine's threads; requests in flight get no more tokens."""
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
                f"The prompt holds a token id outside of 0 to {self._tokenizer.vocabulary_size - 1}.", param="prompt"
            )
        return list(request.prompt)

    def _engine_request(self, request: TextRequest, tokens: list[int], mask: Callable[[], TokenMask] | None) -> Request:
        room = self._context_length - len(tokens)
        if room < 1:
            raise ContextLengthExceeded(
                f"The prompt has {len(tokens)} tokens and the base reads {self._context_length}: shorten the prompt.",
                param="messages" if request.messages else "prompt",
            )
        max_tokens = room if request.max_tokens is None else min(request.max_tokens, room)
        # With a form stop tokens are never text: they are put off as long as anything else can follow.
        put_off = request.ignore_eos and mask is not None
        sampling = SamplingParams(
            max_tokens=max_tokens,
            temperature=request.temperature,
            top_p=request.top_p,
            top_k=request.top_k,
            min_p=request.min_p,
            repetition_penalty=request.repetition_penalty,
            presence_penalty=request.presence_penalty,
            frequency_penalty=request.frequency_penalty,
            logit_bias=request.logit_bias,
            min_tokens=max_tokens if put_off else min(request.min_tokens, room),
            seed=request.seed,
            stop_ids=() if request.ignore_eos and not put_off else self._tokenizer.stop_ids,
            logprobs=request.logprobs,
            echo=request.echo,
        )
        return Request(request.id, request.tenant, tuple(tokens), sampling, request.version, mask=mask)

    async def _chunks(
        self, request: TextRequest, listener: _OutputQueue, prompt_tokens: int
    ) -> AsyncGenerator[TextChunk, None]:
        stream, scanner, completion_tokens = IncrementalDecoder(self._tokenizer), StopScanner(request.stop), 0
        to_echo, chosen = prompt_tokens if request.echo else 0, _Chosen(self._tokenizer.token_bytes)
        while True:
            outputs = await listener.next_outputs()
            last = outputs[-1]
            if last.error is not None:
                raise last.error
            tokens = [token for output in outputs for token in output.tokens]
            # An echoed prompt comes first, whole, and no stop string ends it.
            echo, tokens, to_echo = tokens[:to_echo], tokens[to_echo:], 0
            told = stream.push(echo) if echo else ""
            completion_tokens += len(tokens)
            text = stream.push(tokens) + (stream.finish() if last.finish_reason else "")
            shown, stopped = scanner.push(text)
            if last.finish_reason and not stopped:
                shown += scanner.finish()
            shown = told + shown
            finish = FinishReason.STOP if stopped else last.finish_reason
            logprobs = tuple(chosen.of(entry) for output in outputs for entry in output.logprobs)
            if shown or finish or logprobs:
                yield TextChunk(shown, prompt_tokens, completion_tokens, finish.value if finish else None, logprobs)
            if finish:
                return

    def _run(self) -> None:
        while not self._closing.is_set():
            outputs = self._engine.step() if self._engine.wait(timeout=0.5) else []
            self._last_step = time.monotonic()
            self._deliver(outputs)

    def _deliver(self, outputs: Sequence[Output]) -> None:
        """Hands a step's outputs to the event loops that asked: to each all at once, so that they travel together."""
        ready: dict[asyncio.AbstractEventLoop, list[tuple[_OutputQueue, Output]]] = {}
        for output in outputs:
            if listener := self._queues.get(output.request_id):
                ready.setdefault(listener.loop, []).append((listener, output))
        for loop, theirs in ready.items():
            loop.call_soon_threadsafe(_put_outputs, theirs)


class _Chosen:
    """An answer's tokens with their texts and bytes, in order; the first may lose its leading space."""

    def __init__(self, tokens: TokenBytes) -> None:
        self._tokens = tokens
        self._first = True

    def of(self, entry: EngineLogprobs) -> SampledToken:
        """The next token, and the alternatives to it; no two of them have the same text."""
        names: dict[str, int] = {}
        for token in (entry.token, *(token for token, _ in entry.top)):
            text = self._tokens.text(token, first=self._first)
            names.setdefault(text if names.get(text, token) == token else self._tokens.piece(token), token)
        texts = {token: text for text, token in names.items()}

        def shown(token: int, logprob: float | None) -> TokenText:
            return TokenText(texts[token], logprob, self._tokens.bytes_of(token, first=self._first))

        chosen = SampledToken(shown(entry.token, entry.logprob), tuple(shown(*each) for each in entry.top))
        self._first = self._first and chosen.token.raw is None
        return chosen


def _put_outputs(outputs: Sequence[tuple[_OutputQueue, Output]]) -> None:
    for listener, output in outputs:
        listener.outputs.put_nowait(output)
