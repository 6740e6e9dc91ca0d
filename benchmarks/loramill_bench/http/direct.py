"""The same requests without HTTP, gateway and router.

The functions run in a `WorkerProcess`, where the engine and the replica stay loaded.
"""

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
from loramill.serve.engine import Engine, Request, SamplingParams
from loramill.serve.model import load_model
from loramill.serve.offline import OfflineEngine
from loramill.serve.protocol import TextRequest
from loramill.serve.replica.replica import engine_config
from loramill.settings import ServeSettings
from loramill.sizing.serving import cpu_limits
from loramill_bench.engine.driver import EngineDriver
from loramill_bench.http.answers import Answer, Run
from loramill_bench.http.workload import OUTPUT_TOKENS, CompletionRequest, Stream

_ids = count()


@dataclass(frozen=True, slots=True)
class DirectTarget:
    """A base, its adapters, and the engine's settings.

    Attributes:
        base: The base, in bfloat16.
        adapters: Pairs of an adapter's name, which is also its version, and its PEFT folder.
        settings: The settings of the server that is compared.
    """

    base: Base
    adapters: tuple[tuple[str, Path], ...]
    settings: ServeSettings

    def source(self, version: str) -> Path:
        """The PEFT folder of a version."""
        return dict(self.adapters)[version]

    def version(self, request: CompletionRequest) -> str | None:
        """The version that a request needs; None: the base."""
        return None if request.model == self.base.name else request.model


def run_engine(target: DirectTarget, streams: Sequence[Stream]) -> Run:
    """Runs streams through the engine, from token ids to token ids in one thread. All streams must start at once."""
    engine, tokenizer = _engine(target)
    driver, open_, answers = EngineDriver(engine), dict[str, _OpenAnswer](), list[Answer]()

    def submit(requests: Iterator[Request]) -> None:
        request = next(requests, None)
        if request is not None:
            open_[request.id] = _OpenAnswer(requests, time.perf_counter())
            driver.submit([request])

    requests_by_stream = [_requests(target, tokenizer, stream) for stream in streams]
    begun = time.perf_counter()
    for requests in requests_by_stream:
        submit(iter(requests))
    while driver.open:
        outputs, now = driver.step(), time.perf_counter()
        for output in outputs:
            answer = open_[output.request_id]
            answer.times.append(now - answer.begun)
            answer.tokens += len(output.tokens)
            if output.finish_reason is not None:
                answers.append(Answer.completed(answer.tokens, tuple(answer.times), now - answer.begun))
                submit(open_.pop(output.request_id).rest)
    return Run(time.perf_counter() - begun, 0.0, tuple(answers))


def run_replica(target: DirectTarget, streams: Sequence[Stream]) -> Run:
    """Runs the streams' requests through an offline engine, which is a replica, as many at once as there are streams.

    The answers have no times of chunks.
    """
    running = _offline(target, len(streams))
    rounds = zip(*(stream.requests for stream in streams), strict=True)
    requests = [
        TextRequest(
            "",
            "bench",
            target.version(request),
            prompt=request.prompt,
            sampling_params=SamplingParams(max_tokens=OUTPUT_TOKENS),
            ignore_eos=True,
        )
        for request in chain.from_iterable(rounds)
    ]
    begun = time.perf_counter()
    answers = []
    for completion in running.generate(requests):
        if completion.error is not None:
            raise completion.error
        answers.append(Answer.completed(completion.completion_tokens, (), time.perf_counter() - begun))
    return Run(time.perf_counter() - begun, 0.0, tuple(answers))


@dataclass(slots=True)
class _OpenAnswer:
    """An unfinished answer, and the remaining requests of its stream."""

    rest: Iterator[Request]
    begun: float
    times: list[float] = field(default_factory=list)
    tokens: int = 0


def _requests(target: DirectTarget, tokenizer: ChatTokenizer, stream: Stream) -> list[Request]:
    return [
        Request(
            str(next(_ids)),
            "bench",
            tuple(tokenizer.encode_text(request.prompt)),
            SamplingParams(OUTPUT_TOKENS),
            target.version(request),
        )
        for request in stream.requests
    ]


@cache
def _engine(target: DirectTarget) -> tuple[Engine, ChatTokenizer]:
    base, settings = target.base, target.settings
    model = load_model(
        base.folder, dtype=torch.bfloat16, quantization=base.quantization, threads=settings.threads, device="cpu"
    )
    return Engine(model, target.source, engine_config(settings, cpu_limits(settings))), ChatTokenizer.load(base.folder)


@cache
def _offline(target: DirectTarget, sequences: int) -> OfflineEngine:
    settings = target.settings.model_copy(update={"max_sequences": sequences})
    return OfflineEngine(target.base, target.source, settings)
