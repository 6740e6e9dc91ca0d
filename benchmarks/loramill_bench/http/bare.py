"""The same work without HTTP, gateway and router. Both are called in a process of their own, and stay loaded there."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import chain, count
from pathlib import Path

import torch

from loramill.data.tokenizer import ChatTokenizer
from loramill.models.catalog import Base
from loramill.serve.engine import Engine, EngineConfig, Request, SamplingParams
from loramill.serve.model import load_model
from loramill.serve.offline import OfflineEngine
from loramill.serve.protocol import TextRequest
from loramill.settings import ServeSettings
from loramill_bench.engine.load import Load
from loramill_bench.http.answers import Answer, Run
from loramill_bench.http.work import NEW, Ask, Stream

_ids = count()


@dataclass(frozen=True, slots=True)
class Bare:
    """What is served, and how.

    Attributes:
        base: in bfloat16.
        adapters: PEFT folders by name; a version is called as its adapter.
        settings: those of the server that it is compared with.
    """

    base: Base
    adapters: tuple[tuple[str, Path], ...]
    settings: ServeSettings

    def source(self, version: str) -> Path:
        """Where a version is."""
        return dict(self.adapters)[version]

    def version(self, ask: Ask) -> str | None:
        """That an ask is for; None: the base."""
        return None if ask.model == self.base.name else ask.model


def engine(bare: Bare, streams: Sequence[Stream]) -> Run:
    """Streams to the engine itself, from tokens to tokens in one thread; all must begin at once."""
    engine, tokenizer = _engine(bare)
    load, open_, answers = Load(engine), dict[str, _Open](), list[Answer]()

    def submit(requests: Iterator[Request]) -> None:
        request = next(requests, None)
        if request is not None:
            open_[request.id] = _Open(requests, time.perf_counter())
            load.submit([request])

    asked = [_requests(bare, tokenizer, stream) for stream in streams]
    begun = time.perf_counter()
    for requests in asked:
        submit(iter(requests))
    while load.open:
        outputs, now = load.step(), time.perf_counter()
        for output in outputs:
            answer = open_[output.request_id]
            answer.times.append(now - answer.begun)
            answer.tokens += len(output.tokens)
            if output.finish_reason is not None:
                answers.append(Answer.whole(answer.tokens, tuple(answer.times), now - answer.begun))
                submit(open_.pop(output.request_id).rest)
    return Run(time.perf_counter() - begun, 0.0, tuple(answers))


def offline(bare: Bare, streams: Sequence[Stream]) -> Run:
    """As many requests at once as there are streams, to the offline engine, which is a replica; without their times."""
    running = _offline(bare, len(streams))
    rounds = zip(*(stream.asks for stream in streams), strict=True)
    requests = [
        TextRequest(
            "",
            "bench",
            bare.version(ask),
            prompt=ask.prompt,
            sampling_params=SamplingParams(max_tokens=NEW),
            ignore_eos=True,
        )
        for ask in chain.from_iterable(rounds)
    ]
    begun = time.perf_counter()
    answers = []
    for completion in running.generate(requests):
        if completion.error is not None:
            raise completion.error
        answers.append(Answer.whole(completion.completion_tokens, (), time.perf_counter() - begun))
    return Run(time.perf_counter() - begun, 0.0, tuple(answers))


@dataclass(slots=True)
class _Open:
    """An answer that the engine is at, and what its stream asks after it."""

    rest: Iterator[Request]
    begun: float
    times: list[float] = field(default_factory=list)
    tokens: int = 0


def _requests(bare: Bare, tokenizer: ChatTokenizer, stream: Stream) -> list[Request]:
    return [
        Request(
            str(next(_ids)), "bench", tuple(tokenizer.encode_text(ask.prompt)), SamplingParams(NEW), bare.version(ask)
        )
        for ask in stream.asks
    ]


@cache
def _engine(bare: Bare) -> tuple[Engine, ChatTokenizer]:
    base, settings = bare.base, bare.settings
    limits = {name: value for name, value in settings if name in EngineConfig.__slots__ and value is not None}
    model = load_model(
        base.folder, dtype=torch.bfloat16, quantization=base.quantization, threads=settings.threads, device="cpu"
    )
    return Engine(model, bare.source, EngineConfig(**limits)), ChatTokenizer.load(base.folder)


@cache
def _offline(bare: Bare, sequences: int) -> OfflineEngine:
    settings = bare.settings.model_copy(update={"max_sequences": sequences})
    return OfflineEngine(bare.base, bare.source, settings)
