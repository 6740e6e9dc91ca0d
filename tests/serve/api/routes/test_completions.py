"""Plain completions through the unmodified openai client."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncGenerator
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from loramill.serve.protocol import TextChunk, TextRequest
from loramill.serve.replica.fake import EchoBackend


def test_text_prompt(client: OpenAI, echo: EchoBackend, site: Any) -> None:
    answer = client.completions.create(model="tiny", prompt="a b c", max_tokens=2)
    assert (answer.object, answer.model, answer.system_fingerprint) == (
        "text_completion",
        "tiny",
        site.base.fingerprint[:12],
    )
    [choice] = answer.choices
    assert (choice.text, choice.index, choice.finish_reason, choice.logprobs) == ("a b", 0, "length", None)
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (3, 2, 5)
    assert (echo.requests[0].prompt, echo.requests[0].messages) == ("a b c", ())


def test_openai_default_length_is_16(client: OpenAI, echo: EchoBackend) -> None:
    client.completions.create(model="tiny", prompt="a")
    assert echo.requests[0].sampling_params.max_tokens == 16


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("x y", ["x y"]),
        (["x", "y z"], ["x", "y z"]),
        ([1, 2, 3], [(1, 2, 3)]),
        ([[1, 2], [3]], [(1, 2), (3,)]),
    ],
)
def test_forms_of_prompts(client: OpenAI, echo: EchoBackend, prompt: Any, expected: list[Any]) -> None:
    answer = client.completions.create(model="tiny", prompt=prompt, echo=False, best_of=1, suffix=None)
    assert [request.prompt for request in echo.requests] == expected
    assert [choice.index for choice in answer.choices] == list(range(len(expected)))


class Counting(EchoBackend):
    """Counts how many answers were generated at once."""

    most = 0

    async def generate(self, request: TextRequest) -> AsyncGenerator[TextChunk, None]:
        async for chunk in super().generate(request):
            self.most = max(self.most, len(self.active))
            yield chunk


@pytest.mark.parametrize("stream", [True, False])
def test_many_prompts_are_generated_sixteen_at_a_time(site: Any, client: OpenAI, stream: bool) -> None:
    site.backend.now = backend = Counting(seconds_per_token=0.001)
    answer = client.completions.create(model="tiny", prompt=[f"a b {n}" for n in range(40)], stream=stream)
    chunks = [choice for part in answer for choice in part.choices] if stream else answer.choices
    texts: dict[int, str] = defaultdict(str)
    for chunk in chunks:
        texts[chunk.index] += chunk.text
    assert texts == {n: f"a b {n}" for n in range(40)}
    assert backend.most == 16 and not backend.active


def test_several_prompts_with_several_answers(client: OpenAI, echo: EchoBackend) -> None:
    answer = client.completions.create(model="tiny", prompt=["a b", "c d e"], n=2, seed=7)
    assert [choice.text for choice in answer.choices] == ["a b", "a b", "c d e", "c d e"]
    assert [request.sampling_params.seed for request in echo.requests] == [7, 8, 7, 8]
    assert answer.usage is not None and (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, 10)


def test_logprobs_in_the_legacy_form(client: OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt="a bb c", logprobs=1)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens == ["a", " bb", " c"]
    assert logprobs.text_offset == [0, 1, 4]
    assert logprobs.token_logprobs == [-1.0, -1.0, -1.0]
    assert logprobs.top_logprobs == [{"a": -1.0}, {" bb": -1.0}, {" c": -1.0}]


def test_echo(client: OpenAI, echo: EchoBackend) -> None:
    answer = client.completions.create(model="tiny", prompt="a bb", max_tokens=1, echo=True, logprobs=1)
    [choice] = answer.choices
    assert (choice.text, choice.finish_reason) == ("a bba", "length")
    assert choice.logprobs is not None and choice.logprobs.token_logprobs == [None, -1.0]
    assert choice.logprobs.top_logprobs == [None, {"a": -1.0}] and choice.logprobs.text_offset == [0, 4]
    assert answer.usage is not None and answer.usage.completion_tokens == 1
    scored = client.completions.create(model="tiny", prompt="a bb", max_tokens=0, echo=True)
    assert (scored.choices[0].text, scored.choices[0].finish_reason) == ("a bb", "length")
    streamed = client.completions.create(model="tiny", prompt="a bb", max_tokens=1, echo=True, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == "a bba"
    assert [request.sampling_params.echo for request in echo.requests] == [True] * 3


def test_streaming(client: OpenAI) -> None:
    stream = client.completions.create(
        model="tiny", prompt=["a bb", "c"], stream=True, logprobs=0, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    texts, offsets = {0: "", 1: ""}, {0: [], 1: []}
    for chunk in chunks[:-1]:
        assert (chunk.object, chunk.usage) == ("text_completion", None)
        [choice] = chunk.choices
        texts[choice.index] += choice.text
        offsets[choice.index] += choice.logprobs.text_offset
    assert (texts, offsets) == ({0: "a bb", 1: "c"}, {0: [0, 1], 1: [0]})
    assert {chunk.choices[0].index for chunk in chunks[:-1] if chunk.choices[0].finish_reason == "stop"} == {0, 1}
    assert chunks[-1].choices == [] and chunks[-1].usage.total_tokens == 6


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"max_tokens": 0}, "max_tokens", "invalid_request"),
        ({"max_tokens": -1, "echo": True}, "max_tokens", "invalid_request"),
        ({"suffix": "tail"}, "suffix", "unsupported_parameter"),
        ({"best_of": 3}, "best_of", "unsupported_parameter"),
        ({"logprobs": 6}, "logprobs", "invalid_request"),
        ({"prompt": []}, "prompt", "invalid_request"),
        ({"prompt": ""}, "prompt", "invalid_request"),
        ({"prompt": [[]]}, "prompt[0]", "invalid_request"),
        ({"prompt": ["x"] * 129}, "prompt", "invalid_request"),
        ({"prompt": [1, "x"]}, "prompt[0]", "invalid_request"),
        ({"prompt": {"text": "x"}}, "prompt", "invalid_request"),
    ],
)
def test_refused_fields_are_named(client: OpenAI, echo: EchoBackend, change: Any, param: str, code: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**{"model": "tiny", "prompt": "x", **change})
    assert caught.value.param is not None
    assert (caught.value.param, caught.value.code) == (param, code)
    assert not echo.requests


def test_unknown_model(client: OpenAI, http: httpx.Client) -> None:
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="davinci-002", prompt="x")
