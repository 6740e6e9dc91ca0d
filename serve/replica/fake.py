"""A backend without a model, which echoes the prompt."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Iterator

from loramill.serve.protocol import SampledToken, TextChunk, TextRequest, TokenText
from loramill.serve.replica.stop_strings import StopScanner


class EchoBackend:
    """Repeats the last message or the prompt, one word per token. For tests, and for trying out clients.

    Attributes:
        requests: the requests so far, in order.
        active: ids of the answers that are being generated.
    """

    def __init__(self, *, seconds_per_token: float = 0.0) -> None:
        self.requests: list[TextRequest] = []
        self.active: set[str] = set()
        self._seconds_per_token = seconds_per_token

    async def generate(self, request: TextRequest) -> AsyncGenerator[TextChunk, None]:
        """Streams the echo, one token per chunk."""
        self.requests.append(request)
        self.active.add(request.id)
        try:
            for chunk in echo(request):
                await asyncio.sleep(self._seconds_per_token)
                yield chunk
        finally:
            self.active.discard(request.id)

    async def ready(self) -> None:
        """Returns: the backend is always ready."""


def echo(request: TextRequest) -> Iterator[TextChunk]:
    """The chunks of an echo; it ends as a model's answer does: at a stop string, at the limit, or by itself."""
    params = request.sampling_params
    content = request.messages[-1]["content"] if request.messages else request.prompt or ""
    text = content if isinstance(content, str) else " ".join(map(str, content))
    prompt = re.findall(r"\s*\S+", text) or [""]
    answer = prompt[: params.max_tokens]
    scanner = StopScanner(request.stop)
    if params.echo:
        first = SampledToken(TokenText(text, None, text.encode()))
        yield TextChunk(text, len(prompt), 0, None if answer else "length", () if params.logprobs is None else (first,))
    for count, word in enumerate(answer, start=1):
        text, stopped = scanner.push(word)
        finish = "stop" if stopped else None
        if count == len(answer) and not stopped:
            text, finish = text + scanner.finish(), "stop" if answer == prompt else "length"
        token = TokenText(word, -1.0, word.encode())
        logprobs = () if params.logprobs is None else (SampledToken(token, (token,) * params.logprobs),)
        yield TextChunk(text, len(prompt), count, finish, logprobs)
        if stopped:
            return
