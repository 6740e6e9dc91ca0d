"""Chat and models through the unmodified openai client."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from loramill.serve.replica.fake import EchoBackend

HELLO: Any = [{"role": "user", "content": "one two three"}]


def test_base_answers(client: OpenAI, site: Any, echo: EchoBackend, tenant: str) -> None:
    answer = client.chat.completions.create(model="tiny", messages=HELLO)
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-")
    assert answer.model == "tiny" and answer.system_fingerprint == site.base.fingerprint[:12]
    [choice] = answer.choices
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "stop", None)
    assert choice.message.content == "one two three" and choice.message.role == "assistant"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (3, 3, 6)
    [request] = echo.requests
    params = request.sampling_params
    assert (request.version, request.tenant, params.temperature, params.max_tokens) == (
        None,
        tenant,
        1.0,
        None,
    )


def test_parameters_reach_the_backend(client: OpenAI, echo: EchoBackend) -> None:
    client.chat.completions.create(
        model="tiny",
        messages=[
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]},
        ],
        max_completion_tokens=7,
        temperature=0,
        top_p=0.5,
        seed=11,
        stop="END",
        user="u",
        metadata={"a": "b"},
        store=False,
        presence_penalty=0.5,
        frequency_penalty=-1,
        logit_bias={"17": 3, "4": -100},
        response_format={"type": "text"},
        extra_body={"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2, "min_tokens": 2, "ignore_eos": True},
    )
    [request] = echo.requests
    assert request.messages == ({"role": "developer", "content": "be brief"}, {"role": "user", "content": "hello"})
    assert (
        request.sampling_params.max_tokens,
        request.sampling_params.temperature,
        request.sampling_params.top_p,
        request.sampling_params.top_k,
    ) == (7, 0.0, 0.5, 5)
    params = request.sampling_params
    assert (params.seed, request.stop, request.ignore_eos, params.logprobs) == (
        11,
        ("END",),
        True,
        None,
    )
    assert (
        request.sampling_params.presence_penalty,
        request.sampling_params.frequency_penalty,
        request.sampling_params.repetition_penalty,
    ) == (0.5, -1.0, 1.2)
    params = request.sampling_params
    assert (params.min_p, params.min_tokens, params.logit_bias) == (
        0.1,
        2,
        ((17, 3.0), (4, -100.0)),
    )


TEXT = [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "cache_control": None}]
NULLS = {"refusal": None, "annotations": None, "audio": None, "function_call": None, "tool_calls": None}


@pytest.mark.parametrize(
    ("message", "content"),
    [
        *(({"role": role, "content": TEXT}, "ab") for role in ("system", "developer", "user", "assistant")),
        ({"role": "assistant", "content": "x", **NULLS, "annotations": []}, "x"),
        ({"role": "assistant", "content": None, **NULLS, "refusal": "No."}, "No."),
        ({"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}, "No."),
        ({"role": "assistant", "content": '{"a": 1}', "parsed": {"a": 1}, **NULLS}, '{"a": 1}'),
    ],
)
@pytest.mark.parametrize("name", [None, "ann"])
def test_messages_of_openais_schema_are_accepted(
    client: OpenAI, echo: EchoBackend, message: dict[str, Any], content: str, name: str | None
) -> None:
    client.chat.completions.create(model="tiny", messages=[{**message, "name": name}, *HELLO])  # type: ignore[list-item]
    expected = {"role": message["role"], "content": content} | ({} if name is None else {"name": name})
    assert echo.requests[0].messages[0] == expected


def test_an_answer_is_sent_back_as_it_was_dumped(client: OpenAI, echo: EchoBackend) -> None:
    message = client.chat.completions.create(model="tiny", messages=HELLO).choices[0].message
    for again in (message, message.model_dump(), message.model_dump(exclude_none=True), message.to_dict()):
        client.chat.completions.create(model="tiny", messages=[*HELLO, again, *HELLO])  # type: ignore[list-item]
        assert echo.requests[-1].messages[1] == {"role": "assistant", "content": "one two three"}


def test_finish_reasons(client: OpenAI) -> None:
    short = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=2)
    assert (short.choices[0].message.content, short.choices[0].finish_reason) == ("one two", "length")
    stopped = client.chat.completions.create(model="tiny", messages=HELLO, stop=["o t", "zzz"])
    assert (stopped.choices[0].message.content, stopped.choices[0].finish_reason) == ("one tw", "stop")


def test_several_answers_have_their_own_seeds(client: OpenAI, echo: EchoBackend) -> None:
    answer = client.chat.completions.create(model="tiny", messages=HELLO, n=3, seed=5)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert {choice.message.content for choice in answer.choices} == {"one two three"}
    assert answer.usage is not None and (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 9)
    assert [request.sampling_params.seed for request in echo.requests] == [5, 6, 7]
    assert len({request.id for request in echo.requests}) == 3


def test_logprobs(client: OpenAI, echo: EchoBackend) -> None:
    answer = client.chat.completions.create(model="tiny", messages=HELLO, logprobs=True, top_logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    assert [token.token for token in logprobs.content] == ["one", " two", " three"]
    first = logprobs.content[0]
    assert (first.logprob, first.bytes, len(first.top_logprobs)) == (-1.0, list(b"one"), 2)
    client.chat.completions.create(model="tiny", messages=HELLO, logprobs=True)
    assert [request.sampling_params.logprobs for request in echo.requests] == [2, 0]


def test_an_answer_can_be_sent_back_as_it_came(client: OpenAI, echo: EchoBackend) -> None:
    first = client.chat.completions.create(model="tiny", messages=HELLO)
    again: Any = [*HELLO, first.choices[0].message, {"role": "user", "content": "more"}]
    client.chat.completions.create(model="tiny", messages=again)
    assert [message["role"] for message in echo.requests[1].messages] == ["user", "assistant", "user"]


def test_nulls_mean_the_defaults(http: httpx.Client, echo: EchoBackend) -> None:
    body = {"model": "tiny", "messages": HELLO, "seed": None, "stop": None, "tools": None, "temperature": None}
    assert http.post("/v1/chat/completions", json=body).status_code == 200
    assert (echo.requests[0].sampling_params.seed, echo.requests[0].sampling_params.temperature) == (None, 1.0)


def test_adapter_answers_with_its_pinned_version(client: OpenAI, site: Any, echo: EchoBackend, tenant: str) -> None:
    champion = site.publish(f"{tenant}/support", f"{tenant} first")
    challenger = site.publish(f"{tenant}/support", f"{tenant} second")
    for name, version in {
        f"{tenant}/support": champion,
        f"{tenant}/support@champion": champion,
        f"{tenant}/support@challenger": challenger,
        f"{tenant}/support@{challenger[:12]}": challenger,
    }.items():
        raw = client.chat.completions.with_raw_response.create(model=name, messages=HELLO)
        answer = raw.parse()
        assert raw.headers["x-loramill-version"] == version
        assert raw.headers["x-request-id"].startswith("req-")
        assert answer.model == name
        assert answer.system_fingerprint == f"{site.base.fingerprint[:12]}-{version[:12]}"
        assert (echo.requests[-1].version, echo.requests[-1].tenant) == (version, tenant)
    raw = client.chat.completions.with_raw_response.create(model="tiny", messages=HELLO)
    assert "x-loramill-version" not in raw.headers


@pytest.mark.parametrize(
    "name",
    ["gpt-4o", "{t}/none", "{t}/support@latest", "{t}/support@previous", "{t}/support@abcdef012345", "a/b/c", "@x"],
)
def test_unknown_models(client: OpenAI, site: Any, tenant: str, name: str) -> None:
    site.publish(f"{tenant}/support", f"{tenant} only")
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model=name.format(t=tenant), messages=HELLO)
    assert (caught.value.code, caught.value.param, caught.value.type) == (
        "model_not_found",
        "model",
        "invalid_request_error",
    )


def test_models_are_the_base_and_own_champions(
    client: OpenAI, admin: OpenAI, site: Any, tenant: str, other: str
) -> None:
    version = site.publish(f"{tenant}/support", f"{tenant} v1")
    site.publish(f"{other}/secret", f"{other} v1")
    assert [model.id for model in client.models.list()] == ["tiny", f"{tenant}/support"]
    assert {"tiny", f"{tenant}/support", f"{other}/secret"} <= {model.id for model in admin.models.list()}
    model = client.models.retrieve(f"{tenant}/support@{version[:12]}")
    assert (model.id, model.object, model.owned_by) == (f"{tenant}/support@{version[:12]}", "model", tenant)
    assert client.models.retrieve("tiny").owned_by == "loramill"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4o")
    with pytest.raises(openai.PermissionDeniedError):
        client.models.retrieve(f"{other}/secret")


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"presence_penalty": 2.5}, "presence_penalty", "invalid_request"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x", "invalid_request"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5", "invalid_request"),
        ({"store": True}, "store", "invalid_request"),
        ({"extra_body": {"wibble": 1}}, "wibble", "unsupported_parameter"),
        ({"temperature": 2.5}, "temperature", "invalid_request"),
        ({"temperature": "hot"}, "temperature", "invalid_request"),
        ({"top_p": 0}, "top_p", "invalid_request"),
        ({"n": 9}, "n", "invalid_request"),
        ({"max_tokens": 0}, "max_tokens", "invalid_request"),
        ({"max_tokens": "9"}, "max_tokens", "invalid_request"),
        ({"max_tokens": 3, "max_completion_tokens": 3}, "max_tokens", "invalid_request"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "invalid_request"),
        ({"stop": ""}, "stop", "invalid_request"),
        ({"top_logprobs": 3}, "top_logprobs", "invalid_request"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs", "invalid_request"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_request"),
        ({"messages": []}, "messages", "invalid_request"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "invalid_request"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "invalid_request"),
        ({"messages": [*HELLO, {"role": "user", "content": 5}]}, "messages[1].content", "invalid_request"),
        ({"messages": [{"role": "user", "content": "x", "name": 5}]}, "messages[0].name", "invalid_request"),
        ({"messages": [{"role": "user", "content": "x", "refusal": "no"}]}, "messages[0].refusal", "invalid_request"),
        ({"messages": [{"role": "assistant", "content": None}]}, "messages[0].content", "invalid_request"),
        (
            {"messages": [{"role": "user", "content": [{"type": "refusal", "refusal": "no"}]}]},
            "messages[0].content",
            "invalid_request",
        ),
        (
            {"messages": [{"role": "assistant", "content": "x", "function_call": {"name": "f", "arguments": ""}}]},
            "messages[0].function_call",
            "unsupported_parameter",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content",
            "invalid_request",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]},
            "messages[0].content",
            "invalid_request",
        ),
    ],
)
def test_refused_fields_are_named(client: OpenAI, echo: EchoBackend, change: Any, param: str, code: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{"model": "tiny", "messages": HELLO, **change})
    assert (caught.value.param, caught.value.code, caught.value.type) == (param, code, "invalid_request_error")
    assert param.partition("[")[0] in caught.value.message
    assert not echo.requests


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b'{"model": ', "application/json"),
        (b"[1, 2]", "application/json"),
        (b'"text"', "application/json"),
        (b"", "application/json"),
        (b"\xff\xfe", "application/json"),
        (b"[" * 100_000, "application/json"),
        (b'{"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}', "text/plain"),
        (b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}', "application/json"),
        (b'{"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "temperature": NaN}', "application/json"),
        (
            b'{"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "seed": 1%s}' % (b"0" * 5000),
            "application/json",
        ),
        (b'{"messages": [{"role": "user", "content": "hi"}]}', "application/json"),
    ],
)
def test_broken_bodies_are_400(http: httpx.Client, content: bytes, kind: str) -> None:
    response = http.post("/v1/chat/completions", content=content, headers={"content-type": kind})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error" and error["code"] == "invalid_request" and error["message"]


def test_fifty_at_once(site: Any, tenant: str, echo: EchoBackend) -> None:
    async def send_all() -> list[str | None]:
        async with AsyncOpenAI(base_url=f"{site.url}/v1", api_key=site.key(tenant), max_retries=0) as client:

            async def send(number: int) -> str | None:
                answer = await client.chat.completions.create(
                    model="tiny", messages=[{"role": "user", "content": f"this is {number}"}]
                )
                return answer.choices[0].message.content

            return await asyncio.gather(*(send(number) for number in range(50)))

    assert asyncio.run(send_all()) == [f"this is {number}" for number in range(50)]
    assert not echo.active
