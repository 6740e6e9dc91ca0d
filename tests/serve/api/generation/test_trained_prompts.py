"""Training and serving use the same prompts: each answer of a training line follows the chat endpoint's own prompt."""

from __future__ import annotations

import json
from typing import Any

import pytest

from loramill.data.encoding import encode_example
from loramill.data.examples import read_examples
from loramill.data.tokenizer import ChatTokenizer
from loramill.serve.api.schemas.chat import ChatRequest

USER, ANSWER = {"role": "user", "content": "Where is parcel 7?"}, {"role": "assistant", "content": "In Rome."}
CALL = {"id": "c1", "type": "function", "function": {"name": "parcel", "arguments": '{"id":"7","é":[1.5,null]}'}}
TOOL = {
    "type": "function",
    "function": {
        "strict": True,
        "parameters": {"type": "object", "properties": {"id": {"type": "string"}}},
        "description": "Finds a parcel, <b>é</b>.",
        "name": "parcel",
    },
}
RESULT = {"role": "tool", "content": "in Rome", "tool_call_id": "c1"}
NULLS = {"name": None, "refusal": None, "audio": None, "function_call": None, "tool_calls": None}
LINES: dict[str, dict[str, Any]] = {
    "plain": {"messages": [USER, ANSWER, USER, ANSWER]},
    "system": {"messages": [{"role": "system", "content": ""}, USER, ANSWER]},
    "developer": {"messages": [{"role": "developer", "content": "Be brief."}, USER, ANSWER]},
    "two users": {"messages": [USER, {"role": "user", "content": "Quick!"}, ANSWER]},
    "greeting": {"messages": [{"role": "assistant", "content": "Hi."}, USER, ANSWER]},
    "parts": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]},
            ANSWER,
        ]
    },
    "special": {"messages": [{"role": "user", "content": "What does <|im_end|>\n<|im_start|>system mean?"}, ANSWER]},
    "tools": {
        "messages": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}, RESULT, ANSWER],
        "tools": [TOOL],
    },
    "a tool without parameters": {
        "messages": [USER, ANSWER],
        "tools": [{"type": "function", "function": {"name": "now"}}],
    },
    "calls with text": {
        "messages": [USER, {"role": "assistant", "content": "Well.", "tool_calls": [CALL]}, RESULT, ANSWER],
        "tools": [TOOL],
        "parallel_tool_calls": False,
    },
    "nulls": {"messages": [{**USER, "name": None}, {**ANSWER, **NULLS}, USER, ANSWER]},
}


@pytest.mark.parametrize("kind", LINES)
def test_every_answer_follows_the_prompt_that_the_endpoint_renders(tokenizer: ChatTokenizer, kind: str) -> None:
    line = LINES[kind]
    (example,) = read_examples(json.dumps(line).encode(), "train.jsonl").examples
    spans = [(each, span) for each in encode_example(tokenizer, example).sequences for span in each.spans]
    assert len(spans) == len(example.answers)
    for index, (sequence, span) in zip(example.answers, spans, strict=True):
        if not index:  # a greeting has no prompt
            continue
        request = ChatRequest.model_validate(
            {"model": "m", "messages": line["messages"][:index], "tools": line.get("tools", [])}
        )
        messages = [message.to_template() for message in request.messages]
        served = tokenizer.encode_chat(messages, [tool.to_template() for tool in request.usable_tools])
        assert list(sequence.tokens[: span.start]) == served
