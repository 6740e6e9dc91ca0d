"""Admission: every generation passes the tenant's limits, and is counted in usage and metrics when it ends."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager

from loramill.errors import LoramillError
from loramill.registry.usage import UsageCount
from loramill.serve.api.dependencies import Gateway
from loramill.serve.api.generation.metrics import GenerationMetrics
from loramill.serve.api.generation.model_lookup import Target
from loramill.serve.api.generation.streaming import Admission, generate
from loramill.serve.api.middleware.authentication import Caller
from loramill.serve.api.traffic.observation import CallObservation
from loramill.serve.protocol import TextChunk, TextRequest

#: Characters per token, for prompts that are not tokenized yet. OpenAI estimates with the same number.
CHARS_PER_TOKEN = 4

#: Tokens that are reserved for an answer whose request sets no maximum.
DEFAULT_COMPLETION_ESTIMATE = 256


@asynccontextmanager
async def admitted(
    gateway: Gateway, caller: Caller, target: Target, requests: Sequence[TextRequest], n: int = 1
) -> AsyncIterator[Admission]:
    """Generates all answers of one call while the block runs. Leaving it cancels those that are not finished.

    Args:
        gateway: its limits apply, and it counts the usage.
        caller: who sends the call.
        target: the model.
        requests: one request per answer.
        n: answers per prompt; those to the same prompt are adjacent.

    Raises:
        RateLimited: a limit of the caller's tenant is reached.
        LoramillError: raised by the chunks when the first answer fails; the others are cancelled.
    """
    metrics = GenerationMetrics(target, requests, n)
    try:
        permit = gateway.usage_tracker.acquire(target.tenant, caller.limits, estimate_tokens(requests, n))
    except LoramillError as error:
        metrics.record_end(error)
        raise
    try:
        observed = (target.name, target.version) if target.by_default and target.version else None
        observation = CallObservation(gateway.traffic.add, observed, len(requests))
        with metrics, observation:
            gateway.shadows.copy(target.shadow, target.served.backend, requests)
            on_chunk = observation.recording(metrics.record_chunk)
            async with aclosing(generate(target.served.backend, requests, on_chunk)) as chunks:
                yield Admission(chunks, {**target.headers, **permit.headers})
    finally:
        count = _usage_count(metrics.last_chunks, n)
        gateway.usage_tracker.release(permit, target.name, target.version, count)


def estimate_tokens(requests: Sequence[TextRequest], n: int) -> int:
    """A rough estimate of the tokens of a call. A prompt counts once, however many answers it has."""
    prompts = sum(_prompt_tokens(request) for request in requests[::n])
    max_tokens = (request.sampling_params.max_tokens for request in requests)
    return prompts + sum(DEFAULT_COMPLETION_ESTIMATE if each is None else each for each in max_tokens)


def _prompt_tokens(request: TextRequest) -> int:
    if isinstance(request.prompt, tuple):
        return len(request.prompt)
    texts = [request.prompt] if request.prompt else [str(message.get("content") or "") for message in request.messages]
    return sum(len(text) // CHARS_PER_TOKEN + 1 for text in texts)


def _usage_count(last_chunks: Mapping[int, TextChunk], n: int) -> UsageCount:
    """What was generated, by the last chunk of each answer."""
    prompts: dict[int, int] = {}
    for index, chunk in last_chunks.items():
        prompts[index // n] = max(chunk.prompt_tokens, prompts.get(index // n, 0))
    completion = sum(chunk.completion_tokens for chunk in last_chunks.values())
    return UsageCount(1 if last_chunks else 0, sum(prompts.values()), completion)
