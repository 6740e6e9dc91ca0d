"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

from fastapi import APIRouter, Request
from pydantic import Field, field_validator
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from loramill.chat import Message
from loramill.errors import InvalidRequest
from loramill.serve.api.admission import admit
from loramill.serve.api.answers import Answer, Chunks, respond_streaming, respond_whole
from loramill.serve.api.gateway import Here, Who
from loramill.serve.api.generation import Generation, Reply, usage
from loramill.serve.api.lookup import find_model
from loramill.serve.api.wire import Body
from loramill.serve.protocol import ChosenToken, TokenText

router = APIRouter(tags=["inference"])


class ChatMessage(Body):
    """A message; text parts of a content are joined."""

    # What OpenAI's own answers carry, and callers send back as they got it.
    asks_nothing: ClassVar[Mapping[str, Sequence[Any]]] = {"annotations": ([],), "tool_calls": ([],)}
    role: Literal["system", "developer", "user", "assistant"]
    content: str

    @field_validator("content", mode="before")
    @classmethod
    def _joined(cls, content: object) -> object:
        if not isinstance(content, list):
            return content
        texts = [part["text"] for part in content if _is_text(part)]
        if len(texts) < len(content):
            raise ValueError('only parts like {"type": "text", "text": "…"} are understood')
        return "".join(texts)

    def message(self) -> Message:
        """As chat templates know it."""
        return {"role": "system" if self.role == "developer" else self.role, "content": self.content}


class ChatRequest(Generation):
    """OpenAI's chat completion request, as far as loramill goes."""

    asks_nothing: ClassVar[Mapping[str, Sequence[Any]]] = {
        **Generation.asks_nothing,
        "response_format": ({"type": "text"},),
        "modalities": (["text"],),
        "tools": ([],),
        "tool_choice": ("none", "auto"),
    }
    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    def limit(self) -> int | None:
        """The most tokens of an answer.

        Raises:
            InvalidRequest: it is given twice.
        """
        if None not in (self.max_tokens, self.max_completion_tokens):
            raise InvalidRequest(
                "'max_tokens' and 'max_completion_tokens' say the same thing; give one of them.", param="max_tokens"
            )
        return self.max_completion_tokens or self.max_tokens

    def alternatives(self) -> int | None:
        """How many alternatives to report beside each token; None: no log probabilities at all.

        Raises:
            InvalidRequest: alternatives without log probabilities.
        """
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("'top_logprobs' needs 'logprobs' to be true.", param="top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None


@router.post("/v1/chat/completions")
async def create_chat_completion(body: ChatRequest, request: Request, here: Here, who: Who) -> Response:
    """Answers a conversation, streaming or whole."""
    body.check_stream_options()
    limit, alternatives = body.limit(), body.alternatives()
    target = await run_in_threadpool(find_model, here, who, body.model)
    reply, messages = Reply.to(target, "chatcmpl"), tuple(message.message() for message in body.messages)
    requests = [
        body.text_request(reply, target, index=index, max_tokens=limit, logprobs=alternatives, messages=messages)
        for index in range(body.n)
    ]
    chunks, headers = await admit(here, who, target, requests)
    if body.stream:
        return await respond_streaming(request, chunks, lambda chunks: _chunk_objects(body, reply, chunks), headers)
    return await respond_whole(
        request, chunks, body.n, lambda answers: _completion_object(body, reply, answers), headers
    )


def _completion_object(body: ChatRequest, reply: Reply, answers: list[Answer]) -> dict[str, Any]:
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": answer.text, "refusal": None},
            "logprobs": _logprobs(answer.logprobs) if body.logprobs else None,
            "finish_reason": answer.finish,
        }
        for index, answer in enumerate(answers)
    ]
    return reply.object("chat.completion", choices, usage=usage(answers, body.n))


async def _chunk_objects(body: ChatRequest, reply: Reply, chunks: Chunks) -> AsyncIterator[dict[str, Any]]:
    def chunk_object(index: int, delta: Mapping[str, str], finish: str | None = None, **more: Any) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish, **more}
        return reply.object("chat.completion.chunk", [choice], **({"usage": None} if body.include_usage else {}))

    answers = [Answer() for _ in range(body.n)]
    begun: set[int] = set()
    async for index, chunk in chunks:
        answers[index].add(chunk)
        if index not in begun:
            begun.add(index)
            yield chunk_object(index, {"role": "assistant", "content": ""})
        if chunk.text or chunk.logprobs:
            logprobs = _logprobs(chunk.logprobs) if body.logprobs else None
            yield chunk_object(index, {"content": chunk.text}, logprobs=logprobs)
        if chunk.finish:
            yield chunk_object(index, {}, chunk.finish)
    if body.include_usage:
        yield reply.object("chat.completion.chunk", [], usage=usage(answers, body.n))


def _logprobs(tokens: Sequence[ChosenToken]) -> dict[str, Any]:
    content = [{**_token(token.chosen), "top_logprobs": [_token(top) for top in token.top]} for token in tokens]
    return {"content": content, "refusal": None}


def _token(token: TokenText) -> dict[str, Any]:
    return {"token": token.text, "logprob": token.logprob, "bytes": list(token.text.encode())}


def _is_text(part: object) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
