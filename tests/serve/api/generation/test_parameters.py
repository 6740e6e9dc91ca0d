"""Every parameter that the openai client can send is honored, or is refused by its name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import openai
import pytest
from openai import OpenAI
from openai.resources.chat import Completions as Chat
from openai.resources.completions import Completions

from loramill.serve.replica.fake import EchoBackend

FUNCTION = {"type": "function", "function": {"name": "f"}}

#: A value that is honored, for each parameter that is.
CHAT = {
    "frequency_penalty": 0.5,
    "logit_bias": {"5": 1},
    "logprobs": True,
    "max_completion_tokens": 5,
    "max_tokens": 5,
    "metadata": {"a": "b"},
    "modalities": ["text"],
    "n": 2,
    "parallel_tool_calls": False,
    "presence_penalty": 0.5,
    "prompt_cache_key": "k",
    "response_format": {"type": "json_object"},
    "safety_identifier": "s",
    "seed": 3,
    "service_tier": "auto",
    "stop": ["x"],
    "store": False,
    "stream": True,
    "stream_options": {"include_usage": True},
    "temperature": 0.5,
    "tool_choice": "auto",
    "tools": [FUNCTION],
    "top_logprobs": 1,
    "top_p": 0.5,
    "user": "u",
}
COMPLETIONS = {
    "best_of": 1,
    "echo": True,
    "frequency_penalty": 0.5,
    "logit_bias": {"5": 1},
    "logprobs": 2,
    "max_tokens": 5,
    "n": 2,
    "presence_penalty": 0.5,
    "seed": 3,
    "stop": "x",
    "stream": True,
    "stream_options": {"include_usage": True},
    "suffix": "",
    "temperature": 0.5,
    "top_p": 0.5,
    "user": "u",
}
#: Parameters that a parameter requires.
REQUIRED_WITH: Mapping[str, Mapping[str, Any]] = {
    "stream_options": {"stream": True},
    "top_logprobs": {"logprobs": True},
}

#: A value that is refused, for each parameter with a value that only OpenAI honors.
CHAT_REFUSED = {
    "audio": {"format": "wav", "voice": "alloy"},
    "function_call": "auto",
    "functions": [{"name": "f"}],
    "modalities": ["text", "audio"],
    "moderation": {"model": "m"},
    "prediction": {"type": "content", "content": "x"},
    "prompt_cache_options": {"ttl": "30m"},
    "prompt_cache_retention": "24h",
    "reasoning_effort": "low",
    "service_tier": "flex",
    "verbosity": "low",
    "web_search_options": {},
}
COMPLETIONS_REFUSED = {"best_of": 2, "suffix": "tail"}


def parameters(create: Any) -> set[str]:
    own = {"self", "model", "messages", "prompt", "extra_headers", "extra_query", "extra_body", "timeout"}
    return inspect.signature(create).parameters.keys() - own


def test_no_parameter_is_forgotten() -> None:
    assert parameters(Chat.create) == CHAT.keys() | CHAT_REFUSED.keys()
    assert parameters(Completions.create) == COMPLETIONS.keys() | COMPLETIONS_REFUSED.keys()


def create_chat(client: OpenAI, **more: Any) -> Any:
    return client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x"}], **more)


def create_completion(client: OpenAI, **more: Any) -> Any:
    return client.completions.create(model="tiny", prompt="x", **more)


@pytest.mark.parametrize("name", CHAT)
def test_chat_accepts(client: OpenAI, echo: EchoBackend, name: str) -> None:
    create_chat(client, **{name: CHAT[name]}, **REQUIRED_WITH.get(name, {}))
    assert echo.requests


@pytest.mark.parametrize("name", COMPLETIONS)
def test_completions_accept(client: OpenAI, echo: EchoBackend, name: str) -> None:
    create_completion(client, **{name: COMPLETIONS[name]}, **REQUIRED_WITH.get(name, {}))
    assert echo.requests


@pytest.mark.parametrize(
    ("create", "name", "value"),
    [
        *((create_chat, name, value) for name, value in CHAT_REFUSED.items()),
        *((create_completion, name, value) for name, value in COMPLETIONS_REFUSED.items()),
    ],
)
def test_values_that_are_not_honored_are_refused_by_name(
    client: OpenAI, echo: EchoBackend, create: Any, name: str, value: Any
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        create(client, **{name: value})
    assert (caught.value.param, caught.value.code) == (name, "unsupported_parameter")
    assert not echo.requests
