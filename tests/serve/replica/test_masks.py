"""Structured output: every answer that ends by itself satisfies its constraint, whatever the model."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import aclosing
from dataclasses import fields, replace
from typing import Any

import jsonschema
import llguidance
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher

from loramill.data.tokenizer import ChatTokenizer
from loramill.errors import InvalidRequest, ModelNotFound
from loramill.models.catalog import Base
from loramill.serve.engine import SamplingParams
from loramill.serve.engine.sampling.sampler import Sampler
from loramill.serve.protocol import OutputConstraint, TextRequest
from loramill.serve.replica.masks import MAX_GRAMMAR_CHARACTERS, ConstraintCompiler
from loramill.serve.replica.replica import Replica
from loramill.serve.replica.tool_calls import ToolCall, ToolCallScanner
from loramill.settings import ServeSettings

from ...hermes import SETTINGS, VOCABULARY, hermes_tokenizer

QUESTION = ({"role": "user", "content": "Say it in JSON."},)

SCHEMAS: dict[str, dict[str, Any]] = {
    "integer": {"type": "integer", "minimum": -5, "maximum": 120},
    "number": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    "boolean or null": {"type": ["boolean", "null"]},
    "choice": {"enum": ["red", 7, None, ["a"]]},
    "constant": {"const": {"kind": "x"}},
    "string": {"type": "string", "minLength": 2, "maxLength": 9},
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3,5}$"},
    "date": {"type": "string", "format": "date"},
    "array": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "minItems": 2, "maxItems": 5},
    "tuple": {"type": "array", "prefixItems": [{"type": "boolean"}, {"enum": ["a"]}], "items": False, "minItems": 2},
    "object": {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "maximum": 150}},
        "required": ["name", "age"],
        "additionalProperties": False,
    },
    "optional": {
        "type": "object",
        "properties": {"a": {"type": "boolean"}, "b": {"type": "boolean"}, "c": {"enum": [1, 2]}},
        "required": ["b"],
        "additionalProperties": False,
    },
    "one of several": {
        "anyOf": [
            {"type": "object", "properties": {"x": {"enum": [1]}}, "required": ["x"], "additionalProperties": False},
            {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
        ]
    },
    "tree": {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": {
                "type": "object",
                "properties": {"end": {"type": "boolean"}, "next": {"anyOf": [{"const": 0}, {"$ref": "#/$defs/node"}]}},
                "required": ["end", "next"],
                "additionalProperties": False,
            }
        },
    },
    "letters": {"type": "string", "pattern": "^[àéø🙂]{3}$"},
}  # fmt: skip

WEATHER = {
    "type": "object",
    "properties": {"town": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["town"],
    "additionalProperties": False,
}
NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}


def no_adapters(version: str) -> Any:
    raise ModelNotFound(version)


@pytest.fixture(scope="module")
def replica(hermes_base: Base) -> Iterator[Replica]:
    replica = Replica(
        hermes_base, no_adapters, ServeSettings(device="cpu", threads=1, kv_tokens=16384, max_waiting=128)
    )
    yield replica
    replica.close()


async def collect(replica: Replica, request: TextRequest) -> tuple[str, str | None, int]:
    """The text, the finish reason, and the number of tokens."""
    text, finish, count = "", None, 0
    async with aclosing(replica.generate(request)) as chunks:
        async for chunk in chunks:
            text, finish, count = text + chunk.text, chunk.finish, chunk.completion_tokens
    return text, finish, count


def generate(replica: Replica, *requests: TextRequest) -> list[tuple[str, str | None, int]]:
    async def all_at_once() -> list[tuple[str, str | None, int]]:
        return await asyncio.gather(*(collect(replica, request) for request in requests))

    return asyncio.run(all_at_once())


SAMPLING = {field.name for field in fields(SamplingParams)}


def request(id_: str, constraint: OutputConstraint | None, **more: Any) -> TextRequest:
    """A request for one answer; `more` has fields of `SamplingParams` and of `TextRequest`."""
    params = {"max_tokens": 900, "temperature": 1.0} | {name: more.pop(name) for name in SAMPLING & more.keys()}
    more = {"messages": QUESTION} | more
    return TextRequest(id_, "t", sampling_params=SamplingParams(**params), constraint=constraint, **more)


def test_a_random_model_satisfies_every_schema(replica: Replica) -> None:
    requests = [
        request(f"{name}-{seed}", OutputConstraint("response_format", schema), seed=seed, temperature=seed % 3 / 2)
        for name, schema in SCHEMAS.items()
        for seed in range(6)
    ]
    answers = generate(replica, *requests)
    for each, (text, finish, _) in zip(requests, answers, strict=True):
        assert each.constraint is not None and each.constraint.schema is not None
        if finish == "stop":
            jsonschema.validate(json.loads(text), each.constraint.schema, format_checker=jsonschema.FormatChecker())
        else:
            # Where the schema sets no bound, the answer may reach max_tokens first.
            assert finish == "length" and each.id.startswith(("tree", "number", "integer"))
    assert sum(finish == "stop" for _, finish, _ in answers) > 0.9 * len(answers)


def test_any_object(replica: Replica) -> None:
    requests = [request(str(seed), OutputConstraint("response_format", {"type": "object"}), seed=seed, temperature=1.5,
                        logit_bias=((ord('"') - 33, 6.0), (ord("}") - 33, 4.0))) for seed in range(12)]  # fmt: skip
    ended = [json.loads(text) for text, finish, _ in generate(replica, *requests) if finish == "stop"]
    assert len(ended) > 8 and all(isinstance(value, dict) for value in ended)
    assert any(ended)


leaf = st.sampled_from(
    [
        {"type": "boolean"},
        {"type": "null"},
        {"type": "integer", "minimum": 0, "maximum": 99},
        {"type": "string", "maxLength": 4},
        {"enum": ["a", "b", 3]},
    ]
)
schema = st.recursive(
    leaf,
    lambda inner: st.one_of(
        st.builds(lambda item, most: {"type": "array", "items": item, "maxItems": most}, inner, st.integers(0, 3)),
        st.builds(lambda one, other: {"anyOf": [one, other]}, inner, inner),
        st.builds(
            lambda fields, count: {
                "type": "object",
                "properties": fields,
                "required": list(fields)[:count],
                "additionalProperties": False,
            },
            st.dictionaries(st.sampled_from(["a", "b ", 'c"', "é"]), inner, max_size=3),
            st.integers(0, 3),
        ),
    ),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def compiler() -> Iterator[ConstraintCompiler]:
    compiler = ConstraintCompiler(ChatTokenizer(hermes_tokenizer().to_str(), SETTINGS, {}), VOCABULARY + 3)
    yield compiler
    compiler.close()


def sample_answer(
    compiler: ConstraintCompiler, constraint: OutputConstraint, random: np.random.Generator, **sampling: Any
) -> str | None:
    """The answer of a model with random logits; None if it did not end."""
    tokenizer = hermes_tokenizer()
    stop = tokenizer.token_to_id("<|im_end|>")
    mask = asyncio.run(compiler.mask_factory(constraint))()
    params = SamplingParams(**{"max_tokens": 600, "temperature": 1.0, "seed": 1, "stop_ids": (stop,), **sampling})
    sampler = Sampler(params, (), mask=mask)
    tokens: list[int] = []
    while len(tokens) < params.max_tokens:
        token = sampler.sample(random.normal(size=VOCABULARY + 3, scale=2.0).astype(np.float32))
        assert token is not None and token < VOCABULARY and sampler.error is None
        if token == stop:
            return tokenizer.decode(tokens)
        tokens.append(token)
        sampler.accept(token)
        if sampler.finished:
            return tokenizer.decode(tokens)
    return None


@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    schema,
    st.integers(0, 2**32),
    st.fixed_dictionaries(
        {},
        optional={
            "temperature": st.just(0.0),
            "top_k": st.integers(1, 3),
            "top_p": st.just(0.3),
            "min_p": st.just(0.5),
            "min_tokens": st.integers(1, 600),
            "repetition_penalty": st.just(1.7),
            "logit_bias": st.just(tuple((token, -np.inf) for token in range(100))),
        },
    ),
)
def test_any_schema_with_any_sampling(
    compiler: ConstraintCompiler, schema: Any, seed: int, sampling: Mapping[str, Any]
) -> None:
    text = sample_answer(compiler, OutputConstraint("response_format", schema), np.random.default_rng(seed), **sampling)
    if text is not None:
        jsonschema.validate(json.loads(text), schema)


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "widget"}, "Invalid type: widget"),
        ({"type": "array", "uniqueItems": True}, 'Unimplemented keys: ["uniqueItems"]'),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf constraints are not supported"),
        ({"type": "string", "pattern": "("}, "regex parse error: ( ^ error: unclosed group"),
        ({"type": "integer", "minimum": 5, "maximum": 4}, "Unsatisfiable schema: minimum (5) is greater than maximum"),
        ({"$ref": "#/nowhere"}, "Pointer '/nowhere' does not exist"),
        ({"$ref": "https://example.com/a.json"}, "is not present in a registry"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, "nothing satisfies the schema"),
        ({"enum": ["word " * 20] * 1000}, f"more than {MAX_GRAMMAR_CHARACTERS} characters"),
        ({"allOf": [{"anyOf": [{"required": [f"{x}{i}"]} for x in "ab"]} for i in range(18)]}, "schema too large"),
    ],
)
def test_a_schema_that_cannot_be_enforced_is_refused_with_the_reason(
    replica: Replica, schema: Any, reason: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        generate(replica, request("bad", OutputConstraint("response_format", schema)))
    assert caught.value.param == "response_format" and caught.value.message.startswith("'response_format': ")
    assert (
        reason in caught.value.message and "start:" not in caught.value.message and "%json" not in caught.value.message
    )
    assert len(caught.value.message) < 400
    assert replica.stats().running == 0


def nested(depth: int) -> dict[str, Any]:
    return {"type": "array", "items": nested(depth - 1)} if depth else {"type": "null"}


def test_deep_schemas_are_refused_or_satisfied(replica: Replica) -> None:
    answers = generate(
        replica, *(request(f"deep-{n}", OutputConstraint("response_format", nested(50)), seed=n) for n in range(8))
    )
    assert all(set(text) <= set("[null, \n\t]") for text, _, _ in answers)
    # Chance decides how wide one becomes.
    whole = [json.loads(text) for text, finish, _ in answers if finish == "stop"]
    assert whole
    for each in whole:
        jsonschema.validate(each, nested(50))
    with pytest.raises(InvalidRequest, match="recursion limit"):
        generate(replica, request("deeper", OutputConstraint("response_format", nested(400))))


def test_a_grammar_that_becomes_too_complex_ends_only_its_answer(replica: Replica) -> None:
    # Any of these may come next: more than a row of the parser may hold.
    fields = {f"p{i}": {"type": "string"} for i in range(1500)}
    wide = {"type": "object", "properties": fields, "required": ["p1499"], "additionalProperties": False}

    async def both() -> list[Any]:
        requests = [
            request("wide", OutputConstraint("response_format", wide), seed=1),
            request("other", None, seed=1, max_tokens=40),
        ]
        return await asyncio.gather(*(collect(replica, each) for each in requests), return_exceptions=True)

    broken, other = asyncio.run(both())
    assert isinstance(broken, InvalidRequest) and broken.param == "response_format"
    assert "too complex" in broken.message and "items" in broken.message
    assert other[1:] == ("length", 40)


@pytest.mark.parametrize("several", [False, True])
def test_calls_are_forced(replica: Replica, several: bool) -> None:
    constraint = OutputConstraint(
        "tools", tool_schemas={"weather": WEATHER, "now": NOTHING}, parallel_tool_calls=several
    )
    requests = [request(str(seed), constraint, seed=seed, temperature=2.0, max_tokens=400) for seed in range(12)]
    names, most = set(), 0
    for text, finish, _ in generate(replica, *requests):
        scanner = ToolCallScanner()
        parts = scanner.push(text) + scanner.finish()
        calls = [part for part in parts if isinstance(part, ToolCall)]
        assert calls and (finish == "length" or parts == calls)
        for call in calls:
            names.add(call.name)
            jsonschema.validate(json.loads(call.arguments), constraint.tool_schemas[call.name])
        most = max(most, len(calls))
        assert several or (finish, len(calls)) == ("stop", 1)
    assert names == {"weather", "now"} and (most > 1) == several


def test_json_or_calls(replica: Replica) -> None:
    constraint = OutputConstraint(
        "response_format", {"type": "object", "properties": {}, "additionalProperties": False}, {"now": NOTHING}
    )
    texts = {
        text for text, _, _ in generate(replica, *(request(str(seed), constraint, seed=seed) for seed in range(16)))
    }
    assert any("<tool_call>" in text for text in texts) and any("<tool_call>" not in text for text in texts)


def test_tags_may_be_spelled_where_they_are_not_tokens(hermes_base: Base, tmp_path: Any) -> None:
    tokenizer = hermes_tokenizer(tags_are_tokens=False)
    compiler = ConstraintCompiler(ChatTokenizer(tokenizer.to_str(), SETTINGS, {}), VOCABULARY)
    mask = asyncio.run(compiler.mask_factory(OutputConstraint("tools", tool_schemas={"now": NOTHING})))()
    for token in tokenizer.encode('<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>').ids:
        assert np.unpackbits(mask.allowed_bits(), bitorder="little")[token]
        mask.accept(token)
    assert mask.finished and mask.error is None
    compiler.close()


def test_cut_off_by_max_tokens(replica: Replica) -> None:
    [(text, finish, count)] = generate(
        replica, request("cut", OutputConstraint("response_format", SCHEMAS["object"]), max_tokens=6)
    )
    assert (finish, count) == ("length", 6) and text.startswith("{")


def test_ignoring_the_end_only_delays_it(replica: Replica) -> None:
    constraint = OutputConstraint("response_format", {"type": "integer", "minimum": 0, "maximum": 99999})
    requests = [request(str(seed), constraint, seed=seed, temperature=2.0) for seed in range(12)]
    ended = {len(text) for text, _, _ in generate(replica, *requests)}
    assert len(ended) > 2
    for text, finish, count in generate(replica, *(replace(each, ignore_eos=True) for each in requests)):
        assert (finish, count) == ("stop", len(text)) and (text == "0" or len(text) == 5)


def test_others_in_the_batch_are_not_changed(replica: Replica) -> None:
    plain = [request(f"plain-{seed}", None, seed=seed, max_tokens=30) for seed in range(3)]
    alone = generate(replica, *plain)
    constrained = [
        request(f"constrained-{seed}", OutputConstraint("response_format", SCHEMAS["object"]), seed=seed)
        for seed in range(3)
    ]
    assert generate(replica, *plain, *constrained)[:3] == alone


def test_a_constraint_is_compiled_once_in_a_thread_of_its_own(
    compiler: ConstraintCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[str] = []

    def compile_in(*args: Any, **options: Any) -> LLMatcher:
        threads.append(threading.current_thread().name)
        return LLMatcher(*args, **options)

    monkeypatch.setattr(llguidance, "LLMatcher", compile_in)
    for _ in range(3):
        asyncio.run(compiler.mask_factory(OutputConstraint("response_format", {"type": "object", "title": "once"})))
    assert threads == ["grammar_0"]


def test_the_real_base_satisfies_a_schema(base: Base) -> None:
    replica = Replica(base, no_adapters, ServeSettings(device="cpu", threads=1, kv_tokens=2048, max_sequences=4))
    person = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 30},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "tags": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 3},
        },
        "required": ["name", "age", "tags"],
        "additionalProperties": False,
    }
    try:
        messages = ({"role": "user", "content": "Ada Lovelace was 36. Give her name, age and tags in JSON."},)
        constraint = OutputConstraint("response_format", person)
        requests = [request(str(t), constraint, messages=messages, temperature=t, seed=1) for t in (0.0, 1.0)]
        for text, finish, _ in generate(replica, *requests):
            assert finish == "stop"
            jsonschema.validate(json.loads(text), person)
    finally:
        replica.close()
