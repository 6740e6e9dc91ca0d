"""POST /v1/chat/completions."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, ClassVar

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from loramill.data.messages import CALL_END
from loramill.errors import InvalidRequest
from loramill.serve.api.dependencies import CallerDep, GatewayDep
from loramill.serve.api.generation.admission import admit
from loramill.serve.api.generation.chat_chunks import ChatDeltas, call_object, finish_reason, logprobs_object
from loramill.serve.api.generation.model_lookup import find_model
from loramill.serve.api.generation.streaming import Chunks, GenerationResult, respond_complete, respond_streaming
from loramill.serve.api.schemas.chat import ChatMessage
from loramill.serve.api.schemas.generation import GenerationRequest, ResponseEnvelope, usage_object
from loramill.serve.api.schemas.structured_output import StructuredOutputParams
from loramill.serve.protocol import TextChunk
from loramill.serve.replica.tool_calls import ToolCall, ToolCallScanner

router = APIRouter(tags=["inference"])


class ChatRequest(GenerationRequest, StructuredOutputParams):
    """OpenAI's chat completion request, as far as loramill goes."""

    no_op_values: ClassVar[Mapping[str, Sequence[Any]]] = {
        **GenerationRequest.no_op_values,
        **StructuredOutputParams.no_op_values,
        "modalities": (["text"],),
    }
    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    def completion_limit(self) -> int | None:
        """The most tokens of an answer.

        Raises:
            InvalidRequest: it is given twice.
        """
        if None not in (self.max_tokens, self.max_completion_tokens):
            raise InvalidRequest(
                "'max_tokens' and 'max_completion_tokens' say the same thing; give one of them.", param="max_tokens"
            )
        return self.max_completion_tokens or self.max_tokens

    def logprob_count(self) -> int | None:
        """How many alternatives to report beside each token; None: no log probabilities at all.

        Raises:
            InvalidRequest: alternatives without log probabilities.
        """
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("'top_logprobs' needs 'logprobs' to be true.", param="top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None

    def stop_strings(self) -> tuple[str, ...]:
        """Its own, and the end of the first call where there may be one only and nothing else ends the answer."""
        one_call = self.usable_tools and not self.parallel_tool_calls and self.constraint() is None
        return (*super().stop_strings(), CALL_END) if one_call else super().stop_strings()


@router.post("/v1/chat/completions")
async def create_chat_completion(
    body: ChatRequest, request: Request, gateway: GatewayDep, caller: CallerDep
) -> Response:
    """Answers a conversation, streaming or whole."""
    body.check_stream_options()
    limit, alternatives, constraint = body.completion_limit(), body.logprob_count(), body.constraint()
    target = await find_model(gateway, caller, body.model)
    reply = ResponseEnvelope.for_target(target, "chatcmpl")
    asked = {
        "messages": tuple(message.to_template() for message in body.messages),
        "tools": tuple(tool.to_template() for tool in body.usable_tools),
        "constraint": constraint,
    }
    requests = [
        body.text_request(reply, target, index=index, max_tokens=limit, logprobs=alternatives, echo=False, **asked)
        for index in range(body.n)
    ]
    chunks, headers = await admit(gateway, caller, target, requests, body.n)
    if body.stream:
        return await respond_streaming(request, chunks, lambda chunks: _chunk_texts(body, reply, chunks), headers)
    return await respond_complete(
        request, chunks, body.n, lambda answers: _completion_object(body, reply, answers), headers
    )


def _completion_object(body: ChatRequest, reply: ResponseEnvelope, answers: list[GenerationResult]) -> dict[str, Any]:
    choices = []
    for index, answer in enumerate(answers):
        message, called = _message(answer, tools=bool(body.usable_tools))
        choices.append(
            {
                "index": index,
                "message": message,
                "logprobs": logprobs_object(answer.logprobs) if body.logprobs else None,
                "finish_reason": finish_reason(answer.finish, called=called),
            }
        )
    return reply.object("chat.completion", choices, usage=usage_object(answers, body.n))


async def _chunk_texts(body: ChatRequest, reply: ResponseEnvelope, chunks: Chunks) -> AsyncGenerator[str, None]:
    frame = reply.chunk_template("chat.completion.chunk", body)
    deltas = [ChatDeltas(index, tools=bool(body.usable_tools), logprobs=body.logprobs) for index in range(body.n)]
    last: dict[int, TextChunk] = {}
    async for index, chunk in chunks:
        if index not in last:
            yield frame.render(deltas[index].opening(), GenerationResult(prompt_tokens=chunk.prompt_tokens))
        last[index] = chunk
        for choice in deltas[index].choices(chunk):
            yield frame.render(choice, chunk)
    if body.include_usage:
        yield json.dumps(reply.object("chat.completion.chunk", [], usage=usage_object([*last.values()], body.n)))


def _message(answer: GenerationResult, *, tools: bool) -> tuple[dict[str, Any], bool]:
    """The assistant's message, and whether it calls tools."""
    scanner = ToolCallScanner()
    parts = scanner.push(answer.text) + scanner.finish() if tools else [answer.text]
    text = "".join(part for part in parts if isinstance(part, str))
    calls = [call_object(part) for part in parts if isinstance(part, ToolCall)]
    message = {"role": "assistant", "content": text or None if calls else text, "refusal": None}
    return message | ({"tool_calls": calls} if calls else {}), bool(calls)
