"""POST /v1/completions: plain continuation of a prompt, given as text or as tokens."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Annotated, Any, ClassVar

from fastapi import APIRouter, Request
from pydantic import Field, field_validator
from starlette.responses import Response

from loramill.data.token_bytes import is_utf8
from loramill.errors import InvalidRequest
from loramill.serve.api.dependencies import CallerDep, GatewayDep
from loramill.serve.api.generation.admission import admit
from loramill.serve.api.generation.model_lookup import find_model
from loramill.serve.api.generation.offsets import TextOffsets
from loramill.serve.api.generation.streaming import Chunks, GenerationResult, respond_complete, respond_streaming
from loramill.serve.api.schemas.generation import GenerationRequest, NonEmptyText, ResponseEnvelope, usage_object
from loramill.serve.protocol import SampledToken, TextChunk, TokenText

router = APIRouter(tags=["inference"])

Tokens = Annotated[list[int], Field(min_length=1)]

#: Prompts of one request.
MAX_PROMPTS = 128
Prompts = Annotated[list[NonEmptyText | Tokens], Field(min_length=1, max_length=MAX_PROMPTS)]


class CompletionRequest(GenerationRequest):
    """OpenAI's legacy completion request, as far as loramill goes."""

    no_op_values: ClassVar[Mapping[str, Sequence[Any]]] = {
        **GenerationRequest.no_op_values,
        "best_of": (1,),
        "suffix": ("",),
    }
    prompt: Prompts
    max_tokens: int = Field(default=16, ge=0)  # OpenAI's default
    echo: bool = False
    logprobs: int | None = Field(default=None, ge=0, le=5)

    @field_validator("prompt", mode="before", json_schema_input_type=NonEmptyText | Tokens | Prompts)
    @classmethod
    def _as_prompts(cls, prompt: object) -> object:
        one = isinstance(prompt, str) or (isinstance(prompt, list) and prompt and isinstance(prompt[0], int))
        return [prompt] if one else prompt

    def check_max_tokens(self) -> None:
        """Raises InvalidRequest where nothing is asked for: no tokens, and no echo."""
        if self.max_tokens == 0 and not self.echo:
            raise InvalidRequest("'max_tokens' is 0, which asks for something only with 'echo'.", param="max_tokens")


@router.post("/v1/completions")
async def create_completion(
    body: CompletionRequest, request: Request, gateway: GatewayDep, caller: CallerDep
) -> Response:
    """Continues one prompt or several, streaming or whole."""
    body.check_stream_options()
    body.check_max_tokens()
    target = await find_model(gateway, caller, body.model)
    reply, prompts = (
        ResponseEnvelope.for_target(target, "cmpl"),
        [p if isinstance(p, str) else tuple(p) for p in body.prompt],
    )
    requests = [
        body.text_request(
            reply,
            target,
            index=index,
            max_tokens=body.max_tokens,
            logprobs=body.logprobs,
            prompt=prompts[index // body.n],
            echo=body.echo,
        )
        for index in range(len(prompts) * body.n)
    ]
    chunks, headers = await admit(gateway, caller, target, requests, body.n)
    if body.stream:
        return await respond_streaming(
            request, chunks, lambda chunks: _chunk_texts(body, reply, len(requests), chunks), headers
        )
    return await respond_complete(
        request, chunks, len(requests), lambda answers: _completion_object(body, reply, answers), headers
    )


def _completion_object(
    body: CompletionRequest, reply: ResponseEnvelope, answers: list[GenerationResult]
) -> dict[str, Any]:
    choices = [
        _choice(index, answer.text, answer.finish, _logprobs(body, answer.logprobs, TextOffsets(), len(answer.text)))
        for index, answer in enumerate(answers)
    ]
    return reply.object("text_completion", choices, usage=usage_object(answers, body.n))


async def _chunk_texts(
    body: CompletionRequest, reply: ResponseEnvelope, count: int, chunks: Chunks
) -> AsyncGenerator[str, None]:
    frame = reply.chunk_template("text_completion", body)
    answers, offsets = [GenerationResult() for _ in range(count)], [TextOffsets() for _ in range(count)]
    async for index, chunk in chunks:
        answers[index].add(chunk)
        # Text that is held back still comes, so that only the last chunk knows where all of it ends.
        end = len(answers[index].text) if chunk.finish else None
        logprobs = _logprobs(body, chunk.logprobs, offsets[index], end)
        yield frame.render(_choice_json(index, chunk, logprobs), chunk)
    if body.include_usage:
        yield json.dumps(reply.object("text_completion", [], usage=usage_object(answers, body.n)))


def _choice(index: int, text: str, finish: str | None, logprobs: dict[str, Any] | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}


def _choice_json(index: int, chunk: TextChunk, logprobs: dict[str, Any] | None) -> str:
    """The JSON of `_choice`, written by hand: one is made for every token."""
    finish = "null" if chunk.finish is None else f'"{chunk.finish}"'
    told = "null" if logprobs is None else json.dumps(logprobs)
    return f'{{"index":{index},"text":{json.dumps(chunk.text)},"logprobs":{told},"finish_reason":{finish}}}'


def _logprobs(
    body: CompletionRequest, tokens: Sequence[SampledToken], offsets: TextOffsets, end: int | None
) -> dict[str, Any] | None:
    """Log probabilities in the legacy form; `end` is where the whole answer's text ends, if that is known."""
    if body.logprobs is None:
        return None
    return {
        "tokens": [_token_name(token.token) for token in tokens],
        "token_logprobs": [token.token.logprob for token in tokens],
        # Nothing comes before the first token of a prompt, so it has none.
        "top_logprobs": [
            None if token.token.logprob is None else {_token_name(top): top.logprob for top in token.top}
            for token in tokens
        ],
        "text_offset": [offsets.next_offset(token.token, end) for token in tokens],
    }


def _token_name(token: TokenText) -> str:
    r"""A token as the legacy form names it: `bytes:\xf0\x9f` if it is not text."""
    return token.text if token.raw is None or is_utf8(token.raw) else f"bytes:{token.text}"
