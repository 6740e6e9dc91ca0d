"""What every generation passes between its lookup and the backend: the tenant's limits, the books, the metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import aclosing

from loramill.errors import LoramillError
from loramill.registry.usage import UsageCount
from loramill.serve.api.dependencies import Gateway
from loramill.serve.api.generation.metrics import GenerationMetrics
from loramill.serve.api.generation.model_lookup import Target
from loramill.serve.api.generation.streaming import Chunks, generate
from loramill.serve.api.limits.tracker import Permit, UsageTracker
from loramill.serve.api.middleware.authentication import Caller
from loramill.serve.protocol import TextChunk, TextRequest

#: Characters of a prompt that are taken for one token, as OpenAI does before it has counted.
CHARS_PER_TOKEN = 4

#: Tokens that are reserved for an answer whose request gives no limit.
DEFAULT_COMPLETION_ESTIMATE = 256

#: What a generation says first, to nobody: from then on, closing it is noticed.
_BEGUN = (0, TextChunk("", 0, 0))


async def admit(
    gateway: Gateway, caller: Caller, target: Target, requests: Sequence[TextRequest], n: int = 1
) -> tuple[Chunks, Mapping[str, str]]:
    """Begins to generate all answers of one call; returns their chunks and the response's headers.

    Args:
        n: answers to each prompt, which follow each other.

    Raises:
        RateLimited: a limit of the caller's is reached.
        LoramillError: of the first answer that fails, from the chunks; the others are cancelled.
    """
    watch = GenerationMetrics(target, requests, n)
    try:
        permit = gateway.usage_tracker.acquire(target.tenant, caller.limits, estimate_tokens(requests, n))
    except LoramillError as error:
        watch.record_end(error)
        raise
    chunks = _noted(generate(target.served.backend, requests), watch, gateway.usage_tracker, permit, target, n)
    await anext(chunks)
    return chunks, {**target.headers, **permit.headers}


def estimate_tokens(requests: Sequence[TextRequest], n: int) -> int:
    """Tokens that a call may come to, roughly: a prompt counts once, however many answers there are to it."""
    prompts = sum(_prompt_tokens(request) for request in requests[::n])
    max_tokens = (request.sampling_params.max_tokens for request in requests)
    return prompts + sum(DEFAULT_COMPLETION_ESTIMATE if each is None else each for each in max_tokens)


def _prompt_tokens(request: TextRequest) -> int:
    if isinstance(request.prompt, tuple):
        return len(request.prompt)
    texts = [request.prompt] if request.prompt else [str(message.get("content") or "") for message in request.messages]
    return sum(len(text) // CHARS_PER_TOKEN + 1 for text in texts)


async def _noted(
    chunks: Chunks, watch: GenerationMetrics, books: UsageTracker, permit: Permit, target: Target, n: int
) -> Chunks:
    try:
        with watch:
            yield _BEGUN
            async with aclosing(chunks):
                async for index, chunk in chunks:
                    watch.record_chunk(index, chunk)
                    yield index, chunk
    finally:
        books.release(permit, target.name, target.version, _usage_count(watch.last_chunks, n))


def _usage_count(last: Mapping[int, TextChunk], n: int) -> UsageCount:
    """What came, by the last chunk of each answer."""
    prompts: dict[int, int] = {}
    for index, chunk in last.items():
        prompts[index // n] = max(chunk.prompt_tokens, prompts.get(index // n, 0))
    completion = sum(chunk.completion_tokens for chunk in last.values())
    return UsageCount(1 if last else 0, sum(prompts.values()), completion)
