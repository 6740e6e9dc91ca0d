"""POST /v1/chat/completions."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from loramill.data.conversation import to_request_messages
from loramill.serve.api.dependencies import CallerDep, GatewayDep
from loramill.serve.api.generation.admission import admitted
from loramill.serve.api.generation.chat_chunks import ChatDeltas, call_object, finish_reason, logprobs_object
from loramill.serve.api.generation.model_lookup import find_model, sticky_key
from loramill.serve.api.generation.streaming import Chunks, GenerationResult, respond_complete, respond_streaming
from loramill.serve.api.responses import ERRORS, returns_generation
from loramill.serve.api.schemas.chat import ChatCompletion, ChatCompletionChunk, ChatRequest
from loramill.serve.api.schemas.generation import ResponseEnvelope, usage_object
from loramill.serve.api.storage.consent import Storing, storing
from loramill.serve.protocol import TextChunk
from loramill.serve.replica.tool_calls import ToolCall, ToolCallScanner
from loramill.types import CompletionKind

router = APIRouter(tags=["inference"], responses=ERRORS)


@router.post(
    "/v1/chat/completions",
    summary="Create a chat completion",
    responses=returns_generation(ChatCompletion, ChatCompletionChunk),
    response_class=Response,
)
async def create_chat_completion(
    body: ChatRequest, request: Request, gateway: GatewayDep, caller: CallerDep
) -> Response:
    """Generates answers to a conversation, as JSON or as server-sent events."""
    body.check_stream_options()
    limit, alternatives, constraint = body.completion_limit(), body.logprob_count(), body.constraint()
    target = await find_model(gateway, caller, body.model, sticky_key(caller, body.user))
    envelope = ResponseEnvelope.for_target(target, "chatcmpl")
    kept = await storing(gateway, target, body, CompletionKind.CHAT, _stored_request(body))
    fields = {
        "messages": tuple(message.to_template() for message in body.messages),
        "tools": tuple(tool.to_template() for tool in body.usable_tools),
        "constraint": constraint,
    }
    requests = [
        body.text_request(envelope, target, index=index, max_tokens=limit, logprobs=alternatives, echo=False, **fields)
        for index in range(body.n)
    ]
    admission = admitted(gateway, caller, target, requests, body.n)
    if body.stream:
        return await respond_streaming(request, admission, lambda chunks: _chunk_texts(body, envelope, chunks, kept))
    return await respond_complete(
        request, admission, body.n, lambda results: _completion_object(body, envelope, results, kept)
    )


def _stored_request(body: ChatRequest) -> dict[str, Any]:
    """What is stored of a request: the conversation as in training data."""
    messages = to_request_messages([message.to_template() for message in body.messages])
    tools = [tool.to_template() for tool in body.usable_tools]
    return {"messages": messages, "tools": tools}


def _completion_object(
    body: ChatRequest, envelope: ResponseEnvelope, answers: list[GenerationResult], kept: Storing | None
) -> dict[str, Any]:
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
    response = envelope.object("chat.completion", choices, usage=usage_object(answers, body.n))
    if kept is not None:
        kept.keep(response)
    return response


async def _chunk_texts(
    body: ChatRequest, envelope: ResponseEnvelope, chunks: Chunks, kept: Storing | None
) -> AsyncGenerator[str, None]:
    template = envelope.chunk_template("chat.completion.chunk", body)
    deltas = [ChatDeltas(index, tools=bool(body.usable_tools), logprobs=body.logprobs) for index in range(body.n)]
    last: dict[int, TextChunk] = {}
    texts = ["" for _ in deltas]
    async for index, chunk in chunks:
        if index not in last:
            yield template.render(deltas[index].opening(), GenerationResult(prompt_tokens=chunk.prompt_tokens))
        last[index] = chunk
        if kept is not None:
            texts[index] += chunk.text
        for choice in deltas[index].choices(chunk):
            yield template.render(choice, chunk)
    if kept is not None:
        kept.keep(_streamed_object(body, envelope, texts, last, deltas))
    if body.include_usage:
        yield json.dumps(envelope.object("chat.completion.chunk", [], usage=usage_object([*last.values()], body.n)))


def _streamed_object(
    body: ChatRequest,
    envelope: ResponseEnvelope,
    texts: Sequence[str],
    last: Mapping[int, TextChunk],
    deltas: Sequence[ChatDeltas],
) -> dict[str, Any]:
    """The response that a stream is equal to, with the same tool calls."""
    choices = []
    for index, text in enumerate(texts):
        calls = deltas[index].calls
        message, _ = _message(GenerationResult(text=text), tools=bool(body.usable_tools))
        finish = finish_reason(last[index].finish, called=bool(calls))
        message |= {"tool_calls": calls} if calls else {}
        choices.append({"index": index, "message": message, "logprobs": None, "finish_reason": finish})
    ended = [last[index] for index in range(len(texts))]
    return envelope.object("chat.completion", choices, usage=usage_object(ended, body.n))


def _message(answer: GenerationResult, *, tools: bool) -> tuple[dict[str, Any], bool]:
    """The assistant's message, and whether it calls tools."""
    scanner = ToolCallScanner()
    parts = scanner.push(answer.text) + scanner.finish() if tools else [answer.text]
    text = "".join(part for part in parts if isinstance(part, str))
    calls = [call_object(part) for part in parts if isinstance(part, ToolCall)]
    message = {"role": "assistant", "content": text or None if calls else text, "refusal": None}
    return message | ({"tool_calls": calls} if calls else {}), bool(calls)
