"""Tool calls in a stream of text, split at every position."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loramill.serve.replica.tool_calls import ToolCall, ToolCallScanner


def call(name: str = "f", **arguments: object) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def scan(*pieces: str) -> tuple[str, list[ToolCall]]:
    """All text, and the calls."""
    scanner = ToolCallScanner()
    parts = [part for piece in pieces for part in scanner.push(piece)] + scanner.finish()
    assert "" not in parts
    return "".join(part for part in parts if isinstance(part, str)), [p for p in parts if isinstance(p, ToolCall)]


ANSWERS = {
    "text": ("It is sunny.\n", "It is sunny.\n", []),
    "nothing": ("", "", []),
    "white space": (" \n ", " \n ", []),
    "a call": (call(x=1), "", [ToolCall("f", '{"x": 1}')]),
    "text before": ("Let me see.\n\n" + call(), "Let me see.", [ToolCall("f", "{}")]),
    "text after": (call() + "\nDone.\n", "\nDone.", [ToolCall("f", "{}")]),
    "several": (f"\n{call('a')}\n{call('b', y=[1])} \n", "", [ToolCall("a", "{}"), ToolCall("b", '{"y": [1]}')]),
    "text between": (f"1 {call('a')} 2 {call('b')}", "1 2", [ToolCall("a", "{}"), ToolCall("b", "{}")]),
    "no white space": (
        '<tool_call>{"name":"f","arguments":{"x":{}}}</tool_call>',
        "",
        [ToolCall("f", '{"x": {}}')],
    ),
    "no arguments": ('<tool_call>{"name": "f"}</tool_call>', "", [ToolCall("f", "{}")]),
    "letters": (call(town="Tromsø \U0001f642"), "", [ToolCall("f", '{"town": "Tromsø \U0001f642"}')]),
    "an end in a string": (
        call(x='a </tool_call> "b" <tool_call>'),
        "",
        [ToolCall("f", '{"x": "a </tool_call> \\"b\\" <tool_call>"}')],
    ),
    "without its end": ('Hm. <tool_call>\n{"name": "f", "arguments": {}}\n', "Hm.", [ToolCall("f", "{}")]),
    "cut off": ('<tool_call>\n{"name": "f", "argu', '<tool_call>\n{"name": "f", "argu', []),
    "cut off in the tag": ("so <tool_", "so <tool_", []),
    "no JSON": ("<tool_call>f(1)</tool_call> x", "<tool_call>f(1)</tool_call> x", []),
    "no object": ("<tool_call>[1]</tool_call>", "<tool_call>[1]</tool_call>", []),
    "no name": ('<tool_call>{"arguments": {}}</tool_call>', '<tool_call>{"arguments": {}}</tool_call>', []),
    "arguments as text": (
        '<tool_call>{"name": "f", "arguments": "x"}</tool_call>',
        '<tool_call>{"name": "f", "arguments": "x"}</tool_call>',
        [],
    ),
    "an infinite number": (
        '<tool_call>{"name": "f", "arguments": {"x": 1e999}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"x": 1e999}}</tool_call>',
        [],
    ),
    "a lone surrogate": (
        '<tool_call>{"name": "f", "arguments": {"x": "\\ud800"}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"x": "\\ud800"}}</tool_call>',
        [],
    ),
    "begun twice": (f"<tool_call>{call()}", "<tool_call>", [ToolCall("f", "{}")]),
    "an open string, then a call": (
        f'<tool_call>{{"name": "f\n</tool_call>\n{call("g")}',
        '<tool_call>{"name": "f\n</tool_call>',
        [ToolCall("g", "{}")],
    ),
    "an end alone": ("a </tool_call> b", "a </tool_call> b", []),
    "another tag": ("a <tool> b < c <tool_calls>", "a <tool> b < c <tool_calls>", []),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_text_and_calls_are_the_same_wherever_the_stream_is_cut(name: str) -> None:
    answer, text, calls = ANSWERS[name]
    assert scan(answer) == (text, calls)
    assert scan(*answer) == (text, calls)
    for first in range(len(answer) + 1):
        assert scan(answer[:first], answer[first:]) == (text, calls)


PIECES = ["<tool_call>", "</tool_call>", "\n", '{"name": "f", "arguments": {}}', '"', "<", "x", call("g", y="<"), "\\"]


@settings(max_examples=300)
@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join), st.data())
def test_any_answer_is_the_same_wherever_it_is_cut(answer: str, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(answer)), max_size=6)))
    pieces = [answer[a:b] for a, b in zip([0, *cuts], [*cuts, len(answer)], strict=True)]
    text, calls = scan(answer)
    assert scan(*pieces) == scan(*answer) == (text, calls)
    if not calls:
        assert text == answer


@given(st.text(max_size=40))
def test_text_without_a_call_is_left_alone(text: str) -> None:
    assert scan(text) == (text, [])


def test_no_part_of_a_tag_is_released_early() -> None:
    scanner, text = ToolCallScanner(), ""
    for letter in "I look. " + call(x=1):
        text += "".join(part for part in scanner.push(letter) if isinstance(part, str))
    assert text == "I look."


def test_text_is_released_as_soon_as_it_is_certain() -> None:
    scanner = ToolCallScanner()
    assert scanner.push("one two") == ["one two"]
    assert scanner.push(" three ") == [" three"]
    assert scanner.push("<tool") == []
    assert scanner.push("s> four") == [" <tools> four"]


def test_deep_nesting_is_text() -> None:
    answer = f"<tool_call>{'[' * 100_000}</tool_call>"
    assert scan(answer) == (answer, [])
