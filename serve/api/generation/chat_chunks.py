"""Choices of chat responses and of their chunks."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from loramill.serve.protocol import SampledToken, TextChunk, TokenText
from loramill.serve.replica.tool_calls import ToolCall, ToolCallScanner


class ChatDeltas:
    """The choices of one answer's chunks, as JSON that is written by hand, since one is made for every token.

    Attributes:
        calls: the tool calls so far.
    """

    def __init__(self, index: int, *, tools: bool, logprobs: bool) -> None:
        self._index = index
        self._scanner = ToolCallScanner() if tools else None
        self._logprobs = logprobs
        self.calls: list[dict[str, Any]] = []

    def opening(self) -> str:
        """Returns the choice that begins the answer, with the role."""
        content = '""' if self._scanner is None else "null"
        return self._choice(f'{{"role":"assistant","content":{content}}}')

    def choices(self, chunk: TextChunk) -> Iterator[str]:
        """Returns the choices of a chunk."""
        logprobs = json.dumps(logprobs_object(chunk.logprobs)) if self._logprobs and chunk.logprobs else "null"
        for delta in self._deltas(chunk):
            yield self._choice(delta, logprobs)
            logprobs = "null"
        if chunk.finish:
            yield self._choice("{}", finish=json.dumps(finish_reason(chunk.finish, called=bool(self.calls))))

    def _deltas(self, chunk: TextChunk) -> list[str]:
        if self._scanner is None:
            deltas = [_content(chunk.text)] if chunk.text else []
        else:
            parts = self._scanner.push(chunk.text) + (self._scanner.finish() if chunk.finish else [])
            deltas = [_content(part) if isinstance(part, str) else self._call(part) for part in parts]
        return deltas or ([_content("")] if chunk.logprobs else [])

    def _call(self, call: ToolCall) -> str:
        self.calls.append(call_object(call))
        return json.dumps({"tool_calls": [{"index": len(self.calls) - 1, **self.calls[-1]}]})

    def _choice(self, delta: str, logprobs: str = "null", finish: str = "null") -> str:
        return f'{{"index":{self._index},"delta":{delta},"logprobs":{logprobs},"finish_reason":{finish}}}'


def call_object(call: ToolCall) -> dict[str, Any]:
    """Returns a tool call with a new ID."""
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}


def finish_reason(finish: str | None, *, called: bool) -> str | None:
    """Returns why an answer ended: because of its tool calls, unless it was cut off."""
    return "tool_calls" if called and finish == "stop" else finish


def logprobs_object(tokens: Sequence[SampledToken]) -> dict[str, Any]:
    """Returns the log probabilities of tokens."""
    content = [{**_token(token.token), "top_logprobs": [_token(top) for top in token.top]} for token in tokens]
    return {"content": content, "refusal": None}


def _token(token: TokenText) -> dict[str, Any]:
    return {"token": token.text, "logprob": token.logprob, "bytes": None if token.raw is None else list(token.raw)}


def _content(text: str) -> str:
    return f'{{"content":{json.dumps(text)}}}'
