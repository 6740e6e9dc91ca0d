"""Tools through the unmodified openai client: declared, called, answered; the model's text is an echo."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from loramill.serve.protocol import OutputConstraint
from loramill.serve.replica.fake import EchoBackend

PARAMETERS = {"type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"]}
WEATHER: Any = {"type": "function", "function": {"name": "weather", "description": "d", "parameters": PARAMETERS}}
NOW: Any = {"type": "function", "function": {"name": "now", "strict": True}}
NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}


def call(name: str, **arguments: object) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


OSLO, ROME = call("weather", town="Oslo \u00e9"), call("weather", town="Rome")


def echoing(text: str) -> Any:
    """Messages that the echo answers with `text`."""
    return [{"role": "user", "content": text}]


def create(client: OpenAI, text: str, **more: Any) -> Any:
    return client.chat.completions.create(model="tiny", messages=echoing(text), tools=[WEATHER, NOW], **more)


def functions(calls: Any) -> list[tuple[str, str]]:
    return [(each.function.name, each.function.arguments) for each in calls or []]


def test_calls_are_those_of_the_message(client: OpenAI, echo: EchoBackend) -> None:
    answer = create(client, f"Let me look.\n{OSLO}\n{ROME}", n=2)
    ids = set()
    for choice in answer.choices:
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Let me look.")
        assert functions(choice.message.tool_calls) == [
            ("weather", '{"town": "Oslo é"}'),
            ("weather", '{"town": "Rome"}'),
        ]
        assert {each.type for each in choice.message.tool_calls} == {"function"}
        ids |= {each.id for each in choice.message.tool_calls}
    assert len(ids) == 4 and all(each.startswith("call_") for each in ids)
    [request, _] = echo.requests
    declared = {"name": "weather", "description": "d", "parameters": PARAMETERS}
    assert request.tools == (
        {"type": "function", "function": declared},
        {"type": "function", "function": {"name": "now", "parameters": NO_ARGUMENTS}},
    )
    assert (request.constraint, request.stop) == (None, ())


@pytest.mark.parametrize(
    ("text", "content", "finish"),
    [
        (OSLO, None, "tool_calls"),
        ("It is sunny.", "It is sunny.", "stop"),
        ("<tool_call>{</tool_call>",) * 2 + ("stop",),
    ],
)
def test_content_and_finish(client: OpenAI, text: str, content: str | None, finish: str) -> None:
    [choice] = create(client, text).choices
    assert (choice.message.content, choice.finish_reason) == (content, finish)
    assert (choice.message.tool_calls is None) == (finish == "stop")


def test_an_answer_that_is_cut_off_ends_by_length(client: OpenAI) -> None:
    [choice] = create(client, f"{OSLO} and more", max_tokens=7).choices
    assert (choice.finish_reason, functions(choice.message.tool_calls)) == (
        "length",
        [("weather", '{"town": "Oslo é"}')],
    )


def test_streams(client: OpenAI) -> None:
    chunks = list(create(client, f"Let me look.\n{OSLO}\n{ROME}", stream=True))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert (deltas[0].role, deltas[0].content) == ("assistant", None)
    assert "".join(delta.content or "" for delta in deltas) == "Let me look."
    assert deltas[1].content == "Let"  # text doesn't wait for the calls
    calls = [each for delta in deltas for each in delta.tool_calls or []]
    assert [each.index for each in calls] == [0, 1]
    assert functions(calls) == [("weather", '{"town": "Oslo é"}'), ("weather", '{"town": "Rome"}')]
    assert len({each.id for each in calls}) == 2 and calls[0].type == "function"
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


@pytest.mark.parametrize("text", [f"So: {OSLO}", 'In<tool_call>{"name":"now"}</tool_call>one.'])
def test_logprobs_are_sent_once_although_text_is_held_back(client: OpenAI, text: str) -> None:
    chunks = list(create(client, text, stream=True, logprobs=True))
    tokens = [
        token.token
        for chunk in chunks
        if chunk.choices[0].logprobs is not None
        for token in chunk.choices[0].logprobs.content or []
    ]
    assert "".join(tokens) == text


def test_the_stream_helper_of_the_client(client: OpenAI) -> None:
    with client.chat.completions.stream(model="tiny", messages=echoing(f"Hm. {OSLO}"), tools=[NOW]) as stream:
        events = [event.type for event in stream]
        final = stream.get_final_completion()
    assert {"content.delta", "content.done", "tool_calls.function.arguments.done", "chunk"} <= set(events)
    assert functions(final.choices[0].message.tool_calls) == [("weather", '{"town": "Oslo é"}')]
    assert final.choices[0].message.content == "Hm."


def test_the_async_client_completes_a_whole_round(site: Any, tenant: str, echo: EchoBackend) -> None:
    async def converse() -> str | None:
        async with AsyncOpenAI(base_url=f"{site.url}/v1", api_key=site.key(tenant), max_retries=0) as client:
            messages = echoing(OSLO)
            first = await client.chat.completions.create(model="tiny", messages=messages, tools=[WEATHER])
            [called] = first.choices[0].message.tool_calls or []
            result = {"role": "tool", "tool_call_id": called.id, "content": "snow"}
            again = [*messages, first.choices[0].message, result]
            second = await client.chat.completions.create(model="tiny", messages=again, tools=[WEATHER])
            assert echo.requests[1].messages[1:] == (
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [
                        {
                            "id": called.id,
                            "type": "function",
                            "function": {"name": "weather", "arguments": {"town": "Oslo é"}},
                        }
                    ],
                },
                {"role": "tool", "content": "snow", "tool_call_id": called.id},
            )
            return second.choices[0].message.content

    assert asyncio.run(converse()) == "snow"


def test_a_call_is_sent_back_as_it_was_dumped(client: OpenAI, echo: EchoBackend) -> None:
    called = create(client, OSLO).choices[0].message
    with client.chat.completions.stream(model="tiny", messages=echoing(OSLO), tools=[WEATHER]) as stream:
        streamed = stream.get_final_completion().choices[0].message
    for message in (called, streamed):
        again = message.model_dump()
        result = {"role": "tool", "tool_call_id": again["tool_calls"][0]["id"], "name": "weather", "content": "snow"}
        messages: Any = [*echoing(OSLO), again, result]
        client.chat.completions.create(model="tiny", messages=messages, tools=[WEATHER])
        _, sent, returned = echo.requests[-1].messages
        assert sent["tool_calls"][0]["function"] == {"name": "weather", "arguments": {"town": "Oslo é"}}
        assert sent.keys() == {"role", "content", "tool_calls"} and sent["tool_calls"][0].keys() == {
            "id",
            "type",
            "function",
        }
        assert returned["name"] == "weather"


def test_no_choice_means_no_tools(client: OpenAI, echo: EchoBackend) -> None:
    [choice] = create(client, OSLO, tool_choice="none").choices
    assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (OSLO, None, "stop")
    assert echo.requests[0].tools == ()


@pytest.mark.parametrize("stream", [False, True])
def test_one_call_at_a_time(client: OpenAI, echo: EchoBackend, stream: bool) -> None:
    if stream:
        chunks = list(create(client, f"{OSLO}\n{ROME}", parallel_tool_calls=False, stream=True))
        calls = [each for chunk in chunks for each in chunk.choices[0].delta.tool_calls or []]
    else:
        calls = create(client, f"{OSLO}\n{ROME}", parallel_tool_calls=False).choices[0].message.tool_calls
    assert functions(calls) == [("weather", '{"town": "Oslo é"}')]
    assert echo.requests[0].stop == ("</tool_call>",)


@pytest.mark.parametrize(
    ("options", "constraint"),
    [
        ({}, None),
        ({"tool_choice": "auto"}, None),
        (
            {"tool_choice": "required"},
            OutputConstraint("tools", None, {"weather": PARAMETERS, "now": NO_ARGUMENTS}, parallel_tool_calls=True),
        ),
        (
            {"tool_choice": "required", "parallel_tool_calls": False},
            OutputConstraint("tools", None, {"weather": PARAMETERS, "now": NO_ARGUMENTS}),
        ),
        (
            {"tool_choice": {"type": "function", "function": {"name": "weather"}}},
            OutputConstraint("tools", None, {"weather": PARAMETERS}),
        ),
        (
            {"response_format": {"type": "json_object"}},
            OutputConstraint(
                "response_format",
                {"type": "object"},
                {"weather": PARAMETERS, "now": NO_ARGUMENTS},
                parallel_tool_calls=True,
            ),
        ),
        (
            {"response_format": {"type": "json_object"}, "tool_choice": "none"},
            OutputConstraint("response_format", {"type": "object"}),
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"enum": [1]}, "strict": True, "description": "d"},
                },
                "tool_choice": "none",
            },
            OutputConstraint("response_format", {"enum": [1]}),
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}, "tool_choice": "none"},
            OutputConstraint("response_format", {"type": "object"}),
        ),
    ],
)
def test_the_constraint_of_an_answer(
    client: OpenAI, echo: EchoBackend, options: Any, constraint: OutputConstraint | None
) -> None:
    create(client, OSLO, **options)
    assert echo.requests[0].constraint == constraint
    assert echo.requests[0].stop == ()


def function(**what: Any) -> Any:
    return [{"type": "function", "function": {"name": "f", **what}}]


def calling(arguments: Any, role: str = "assistant", **what: Any) -> Any:
    return [
        {
            "role": role,
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}, **what}],
        }
    ]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"tools": function(name="a b")}, "tools[0].function.name"),
        ({"tools": function(parameters=[])}, "tools[0].function.parameters"),
        ({"tools": function(returns={})}, "tools[0].function.returns"),
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": function() * 129}, "tools"),
        ({"tools": function() * 2}, "tools"),
        ({"tools": function(), "tool_choice": "any"}, "tool_choice"),
        ({"tools": function(), "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
        ({"tools": function(), "tool_choice": {"type": "allowed_tools", "allowed_tools": {}}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
        ({"tools": function(), "parallel_tool_calls": "yes"}, "parallel_tool_calls"),
        ({"messages": calling("{")}, "messages[0].tool_calls[0].function.arguments"),
        ({"messages": calling("[]")}, "messages[0].tool_calls[0].function.arguments"),
        ({"messages": calling("[" * 9000)}, "messages[0].tool_calls[0].function.arguments"),
        ({"messages": calling({})}, "messages[0].tool_calls[0].function.arguments"),
        ({"messages": calling("{}", type="custom")}, "messages[0].tool_calls[0].type"),
        ({"messages": calling("{}", role="user")}, "messages[0].tool_calls"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "user", "content": "x", "tool_call_id": "1"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "tool", "tool_call_id": "1"}]}, "messages[0].content"),
        ({"response_format": {"type": "grammar"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema"),
        ({"response_format": "json"}, "response_format"),
    ],
)
def test_refused_fields_are_named(client: OpenAI, echo: EchoBackend, change: Any, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{"model": "tiny", "messages": echoing("x"), **change})
    assert caught.value.param is not None and caught.value.param.startswith(param)
    assert param.rpartition(".")[2].partition("[")[0] in caught.value.message
    assert not echo.requests
