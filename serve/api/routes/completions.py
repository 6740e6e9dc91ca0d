"""POST /v1/completions: plain continuation of a prompt, given as text or as tokens."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from loramill.data.token_bytes import is_utf8
from loramill.serve.api.dependencies import CallerDep, GatewayDep
from loramill.serve.api.generation.admission import admitted
from loramill.serve.api.generation.model_lookup import find_model, sticky_key
from loramill.serve.api.generation.offsets import TextOffsets
from loramill.serve.api.generation.streaming import Chunks, GenerationResult, respond_complete, respond_streaming
from loramill.serve.api.responses import ERRORS, returns_generation
from loramill.serve.api.schemas.completions import Completion, CompletionRequest
from loramill.serve.api.schemas.generation import ResponseEnvelope, usage_object
from loramill.serve.api.storage.consent import Storing, storing
from loramill.serve.protocol import SampledToken, TextChunk, TokenText
from loramill.types import CompletionKind

router = APIRouter(tags=["inference"], responses=ERRORS)


@router.post(
    "/v1/completions",
    summary="Create a completion",
    responses=returns_generation(Completion, Completion),
    response_class=Response,
)
async def create_completion(
    body: CompletionRequest, request: Request, gateway: GatewayDep, caller: CallerDep
) -> Response:
    """Continues one prompt or several, as JSON or as server-sent events."""
    body.check_stream_options()
    body.check_max_tokens()
    target = await find_model(gateway, caller, body.model, sticky_key(caller, body.user))
    envelope = ResponseEnvelope.for_target(target, "cmpl")
    stored_request = {"prompts": body.prompt, "n": body.n, "echo": body.echo}
    kept = await storing(gateway, target, body, CompletionKind.TEXT, stored_request)
    prompts = [prompt if isinstance(prompt, str) else tuple(prompt) for prompt in body.prompt]
    requests = [
        body.text_request(
            envelope,
            target,
            index=index,
            max_tokens=body.max_tokens,
            logprobs=body.logprobs,
            prompt=prompts[index // body.n],
            echo=body.echo,
        )
        for index in range(len(prompts) * body.n)
    ]
    count = len(requests)
    admission = admitted(gateway, caller, target, requests, body.n)
    if body.stream:
        return await respond_streaming(
            request, admission, lambda chunks: _chunk_texts(body, envelope, count, chunks, kept)
        )
    return await respond_complete(
        request, admission, count, lambda results: _completion_object(body, envelope, results, kept)
    )


def _completion_object(
    body: CompletionRequest, envelope: ResponseEnvelope, answers: list[GenerationResult], kept: Storing | None
) -> dict[str, Any]:
    choices = [
        _choice(index, answer.text, answer.finish, _logprobs(body, answer.logprobs, TextOffsets(), len(answer.text)))
        for index, answer in enumerate(answers)
    ]
    response = envelope.object("text_completion", choices, usage=usage_object(answers, body.n))
    if kept is not None:
        kept.keep(response)
    return response


async def _chunk_texts(
    body: CompletionRequest, envelope: ResponseEnvelope, count: int, chunks: Chunks, kept: Storing | None
) -> AsyncGenerator[str, None]:
    template = envelope.chunk_template("text_completion", body)
    answers, offsets = [GenerationResult() for _ in range(count)], [TextOffsets() for _ in range(count)]
    async for index, chunk in chunks:
        answers[index].add(chunk)
        # Some text may still be held back, so only the last chunk reveals where the answer ends.
        end = len(answers[index].text) if chunk.finish else None
        logprobs = _logprobs(body, chunk.logprobs, offsets[index], end)
        yield template.render(_choice_json(index, chunk, logprobs), chunk)
    if kept is not None:
        choices = [_choice(index, answer.text, answer.finish, None) for index, answer in enumerate(answers)]
        kept.keep(envelope.object("text_completion", choices, usage=usage_object(answers, body.n)))
    if body.include_usage:
        yield json.dumps(envelope.object("text_completion", [], usage=usage_object(answers, body.n)))


def _choice(index: int, text: str, finish: str | None, logprobs: dict[str, Any] | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}


def _choice_json(index: int, chunk: TextChunk, logprobs: dict[str, Any] | None) -> str:
    """The JSON of `_choice`, written by hand, since one is made for every token."""
    finish = "null" if chunk.finish is None else f'"{chunk.finish}"'
    logprobs_json = "null" if logprobs is None else json.dumps(logprobs)
    return f'{{"index":{index},"text":{json.dumps(chunk.text)},"logprobs":{logprobs_json},"finish_reason":{finish}}}'


def _logprobs(
    body: CompletionRequest, tokens: Sequence[SampledToken], offsets: TextOffsets, end: int | None
) -> dict[str, Any] | None:
    """Log probabilities in the legacy format; `end` is the length of the whole answer if it is known."""
    if body.logprobs is None:
        return None
    return {
        "tokens": [_token_name(token.token) for token in tokens],
        "token_logprobs": [token.token.logprob for token in tokens],
        # The first token of a prompt has none, since nothing precedes it.
        "top_logprobs": [
            None if token.token.logprob is None else {_token_name(top): top.logprob for top in token.top}
            for token in tokens
        ],
        "text_offset": [offsets.next_offset(token.token, end) for token in tokens],
    }


def _token_name(token: TokenText) -> str:
    r"""A token's name in the legacy format: `bytes:\xf0\x9f` if it is not valid text."""
    return token.text if token.raw is None or is_utf8(token.raw) else f"bytes:{token.text}"
