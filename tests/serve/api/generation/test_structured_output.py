"""JSON and calls by the unmodified openai client, from an engine whose model is random."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from openai import AsyncOpenAI, OpenAI, pydantic_function_tool
from pydantic import BaseModel, Field

from loramill.errors import ModelNotFound
from loramill.models.catalog import Base
from loramill.serve.replica.replica import Replica
from loramill.settings import ServeSettings

from ....hermes import SPECIAL, VOCABULARY

#: Logits that the model has beyond its tokens.
UNUSED = [f"token_id:{VOCABULARY + more}" for more in range(3)]

QUESTION: Any = [{"role": "user", "content": "In JSON!"}]


class Person(BaseModel):
    name: str = Field(max_length=8)
    mood: Literal["good", "bad"]
    tags: list[Literal["a", "b"]] = Field(max_length=3)


class Weather(BaseModel):
    """The weather of a town."""

    town: Literal["Oslo", "Rome"]


def no_adapters(version: str) -> Any:
    raise ModelNotFound(version)


@pytest.fixture(scope="module")
def replica(hermes_base: Base) -> Iterator[Replica]:
    replica = Replica(hermes_base, no_adapters, ServeSettings(device="cpu", threads=1, kv_tokens=8192))
    yield replica
    replica.close()


@pytest.fixture(autouse=True)
def random_model(site: Any, echo: Any, replica: Replica) -> None:
    site.backend.now = replica


def test_answers_parse_into_a_model(client: OpenAI) -> None:
    answer = client.chat.completions.parse(model="tiny", messages=QUESTION, response_format=Person, n=3, seed=1)
    for choice in answer.choices:
        assert isinstance(choice.message.parsed, Person) and choice.finish_reason == "stop"


def test_streams_parse_into_a_model(client: OpenAI) -> None:
    with client.chat.completions.stream(model="tiny", messages=QUESTION, response_format=Person, seed=2) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert {"content.delta", "content.done"} <= set(kinds)
    assert isinstance(final.choices[0].message.parsed, Person)


def test_any_object_and_a_limit(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=QUESTION, response_format={"type": "json_object"}, max_tokens=5, seed=1
    )
    [choice] = answer.choices
    assert choice.message.content is not None and choice.message.content.startswith("{")
    assert choice.finish_reason == "length" or json.loads(choice.message.content) is not None


def test_forced_calls_parse_into_a_model(client: OpenAI) -> None:
    answer = client.chat.completions.parse(
        model="tiny",
        messages=QUESTION,
        tools=[pydantic_function_tool(Weather)],
        tool_choice={"type": "function", "function": {"name": "Weather"}},
        seed=1,
    )
    [choice] = answer.choices
    [called] = choice.message.tool_calls or []
    assert isinstance(called.function.parsed_arguments, Weather)
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)


def test_forced_calls_stream_with_the_async_client(site: Any, tenant: str) -> None:
    async def stream() -> Any:
        options: Any = {"tools": [pydantic_function_tool(Weather)], "tool_choice": "required", "seed": 3}
        async with (
            AsyncOpenAI(base_url=f"{site.url}/v1", api_key=site.key(tenant), max_retries=0) as client,
            client.chat.completions.stream(
                model="tiny", messages=QUESTION, parallel_tool_calls=False, **options
            ) as stream,
        ):
            kinds = [event.type async for event in stream]
            return kinds, await stream.get_final_completion()

    kinds, final = asyncio.run(stream())
    assert "tool_calls.function.arguments.done" in kinds
    [called] = final.choices[0].message.tool_calls
    assert isinstance(called.function.parsed_arguments, Weather)


@pytest.mark.parametrize("stream", [False, True])
def test_a_schema_that_cannot_be_enforced_is_a_400(client: OpenAI, stream: bool) -> None:
    schema = {"name": "x", "schema": {"type": "array", "uniqueItems": True}}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model="tiny",
            messages=QUESTION,
            response_format={"type": "json_schema", "json_schema": schema},
            stream=stream,
        )
    assert (caught.value.param, caught.value.code) == ("response_format", "invalid_request")
    assert "uniqueItems" in caught.value.message


def test_tools_whose_schema_cannot_be_enforced_are_a_400(client: OpenAI) -> None:
    tool: Any = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"not": {}}}}}}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=QUESTION, tools=[tool], tool_choice="required")
    assert caught.value.param == "tools"


def test_raw_and_streaming_responses(client: OpenAI) -> None:
    options: Any = {"model": "tiny", "messages": QUESTION, "response_format": {"type": "json_object"}, "max_tokens": 4}
    raw = client.chat.completions.with_raw_response.create(**options)
    assert raw.parse().choices[0].message.content and raw.headers["x-request-id"]
    with client.chat.completions.with_streaming_response.create(**options, stream=True) as response:
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]" and json.loads(lines[0].removeprefix("data: "))["choices"]


def test_prompts_are_scored(client: OpenAI, hermes_base: Base) -> None:
    prompt = "Tromsø, ja. END"
    scored = client.completions.create(model="tiny", prompt=prompt, max_tokens=0, echo=True, logprobs=2, stop="ja")
    [choice] = scored.choices
    assert choice.logprobs is not None
    assert (choice.text, choice.finish_reason) == (prompt, "length")
    count = len(prompt.encode())
    logprobs = choice.logprobs.token_logprobs or []
    assert len(logprobs) == count and logprobs[0] is None and all(each < 0 for each in logprobs[1:])
    tops = choice.logprobs.top_logprobs or []
    assert len(tops) == count and tops[0] is None and all(len(top) == 2 for top in tops[1:])
    assert scored.usage is not None and (scored.usage.prompt_tokens, scored.usage.completion_tokens) == (count, 0)
    on = client.completions.create(model="tiny", prompt=prompt, max_tokens=3, echo=True, temperature=0, logprobs=0)
    plain = client.completions.create(model="tiny", prompt=prompt, max_tokens=3, temperature=0, logprobs=0)
    assert on.choices[0].text == prompt + plain.choices[0].text
    assert on.usage == plain.usage
    assert on.choices[0].logprobs is not None and plain.choices[0].logprobs is not None
    after = (on.choices[0].logprobs.token_logprobs or [])[count:]
    assert after == pytest.approx(plain.choices[0].logprobs.token_logprobs, abs=1e-3)
    assert (on.choices[0].logprobs.token_logprobs or [])[1:count] == pytest.approx(logprobs[1:], abs=1e-3)


EMOJI = "Emoji list: \U0001f600 \U0001f603 \U0001f604"


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_that_are_parts_of_a_character_are_shown_as_bytes(client: OpenAI, stream: bool) -> None:
    """The model reads bytes, so that none of an emoji's four tokens is a character."""
    options: Any = {"prompt": EMOJI, "echo": True, "logprobs": 5, "max_tokens": 6, "n": 2, "seed": 5}
    answer: Any = client.completions.create(model="tiny", stream=stream, **options)
    texts, entries = ["", ""], [[], []]
    for chunk in answer if stream else [answer]:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            if (found := choice.logprobs) is not None:
                rows = zip(found.tokens, found.token_logprobs, found.top_logprobs, found.text_offset, strict=True)
                entries[choice.index] += rows
    for text, rows in zip(texts, entries, strict=True):
        assert text.startswith(EMOJI)
        prompt = rows[: len(EMOJI.encode())]
        assert [token for token, *_ in prompt[12:16]] == [r"bytes:\xf0", r"bytes:\x9f", r"bytes:\x98", r"bytes:\x80"]
        offsets = [offset for *_, offset in rows]
        assert offsets[11:18] == [11, 12, 12, 12, 12, 13, 14] and offsets == sorted(offsets)
        assert offsets[-1] <= len(text)
        for token, logprob, top, _ in rows[1:]:
            assert len(top) in {5, 6} and top.get(token, logprob) == logprob
            assert all(top[name] >= logprob for name in list(top)[:1])


@pytest.mark.parametrize("stream", [False, True])
def test_bytes_of_a_chats_tokens_are_its_text(client: OpenAI, stream: bool) -> None:
    options: Any = {"messages": QUESTION, "logprobs": True, "top_logprobs": 20, "max_tokens": 40, "seed": 7}
    answer: Any = client.chat.completions.create(model="tiny", stream=stream, **options)
    text, tokens = "", []
    for chunk in answer if stream else [answer]:
        for choice in chunk.choices:
            text += (choice.delta if stream else choice.message).content or ""
            tokens += choice.logprobs.content if choice.logprobs else []
    assert tokens
    raw = b"".join(bytes(token.bytes or ()) for token in tokens)
    assert raw.decode(errors="replace") == text
    for token in tokens:
        names = [top.token for top in token.top_logprobs]
        assert len(names) == len(set(names)) == 20
        assert {top.token for top in token.top_logprobs if top.bytes is None} <= {*SPECIAL, *UNUSED}
