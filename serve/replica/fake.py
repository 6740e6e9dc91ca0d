"""A backend without a model: answers with what it was asked, word by word."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Iterator

from loramill.serve.protocol import SampledToken, TextChunk, TextRequest, TokenText
from loramill.serve.replica.stop_strings import StopScanner


class EchoBackend:
    """Repeats the last message or the prompt; a word with its space is a token. For tests and for trying clients.

    Attributes:
        requests: what was asked, in order.
        open: ids of the answers that are being generated now.
    """

    def __init__(self, *, seconds_per_token: float = 0.0) -> None:
        self.requests: list[TextRequest] = []
        self.active: set[str] = set()
        self._seconds_per_token = seconds_per_token

    async def generate(self, request: TextRequest) -> AsyncGenerator[TextChunk, None]:
        """Streams the echo, a token a chunk."""
        self.requests.append(request)
        self.active.add(request.id)
        try:
            for chunk in echo(request):
                await asyncio.sleep(self._seconds_per_token)
                yield chunk
        finally:
            self.active.discard(request.id)

    async def ready(self) -> None:
        """Always."""


def echo(request: TextRequest) -> Iterator[TextChunk]:
    """The chunks of an echo, which ends as a model's answer would: by a stop string, the limit, or by itself."""
    asked = request.messages[-1]["content"] if request.messages else request.prompt or ""
    text = asked if isinstance(asked, str) else " ".join(map(str, asked))
    words = re.findall(r"\s*\S+", text) or [""]
    said = words[: request.max_tokens]
    scanner = StopScanner(request.stop)
    if request.echo:
        first = SampledToken(TokenText(text, None, text.encode()))
        yield TextChunk(text, len(words), 0, None if said else "length", () if request.logprobs is None else (first,))
    for count, word in enumerate(said, start=1):
        text, stopped = scanner.push(word)
        finish = "stop" if stopped else None
        if count == len(said) and not stopped:
            text, finish = text + scanner.finish(), "stop" if said == words else "length"
        token = TokenText(word, -1.0, word.encode())
        logprobs = () if request.logprobs is None else (SampledToken(token, (token,) * request.logprobs),)
        yield TextChunk(text, len(words), count, finish, logprobs)
        if stopped:
            return
