"""Training lines in OpenAI's format: read, and rendered as transformers renders them."""

from __future__ import annotations

import json
from typing import Any

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from loramill.data.conversation import LineError, answer_text, read_conversation, read_text, to_request_messages
from loramill.data.encoding import check_tokens, encode_example
from loramill.data.examples import Example, read_examples
from loramill.data.tokenizer import ChatTokenizer
from loramill.errors import DatasetInvalid
from loramill.models.catalog import Base

from ...hermes import SETTINGS, TEMPLATE, hermes_tokenizer

END = 257


def hermes(template: str = TEMPLATE) -> ChatTokenizer:
    return ChatTokenizer(hermes_tokenizer().to_str(), {**SETTINGS, "chat_template": template}, {})


def turn(role: str, content: object, **more: object) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def call(arguments: object = '{"id":"7"}', call_id: str = "c1") -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": "parcel", "arguments": arguments}}


PARCEL = {
    "name": "parcel",
    "description": "Where it is, é.",
    "parameters": {"type": "object", "properties": {"id": {"type": "string"}}},
}
TOOL = {"type": "function", "function": PARCEL}
USER, ANSWER = turn("user", "Where is parcel 7?"), turn("assistant", "It is in Rome.")
TOOLS = {
    "messages": [
        USER,
        turn("assistant", None, tool_calls=[call()]),
        turn("tool", "in Rome", tool_call_id="c1"),
        ANSWER,
    ],
    "tools": [TOOL],
    "parallel_tool_calls": False,
}
FUNCTIONS = {
    "messages": [
        USER,
        turn("assistant", None, function_call={"name": "parcel", "arguments": '{"id":"7"}'}),
        turn("function", "in Rome", name="parcel"),
        ANSWER,
    ],
    "functions": [PARCEL],
}
NULLS = {"name": None, "tool_calls": None, "function_call": None, "refusal": None, "audio": None, "annotations": []}


def example(line: dict[str, Any]) -> Example:
    (found,) = read_examples(json.dumps(line).encode(), "train.jsonl").examples
    return found


def test_tools_and_their_results_are_read() -> None:
    found = example(TOOLS)
    assert [message["role"] for message in found.messages] == ["user", "assistant", "tool", "assistant"]
    made = {"id": "c1", "type": "function", "function": {"name": "parcel", "arguments": {"id": "7"}}}
    assert (found.messages[1]["content"], found.messages[1]["tool_calls"]) == ("", [made])
    assert found.messages[2]["tool_call_id"] == "c1"
    assert [dict(tool) for tool in found.tools] == [TOOL]
    assert found.supervised_answers("all") == [(1, 1.0), (3, 1.0)]


def test_legacy_functions_are_tools() -> None:
    old, new = example(FUNCTIONS), example(TOOLS)
    assert old.tools == new.tools
    assert old.messages[2] == {"role": "tool", "content": "in Rome", "name": "parcel", "tool_call_id": "call00000"}
    assert old.messages[1]["tool_calls"][0]["function"] == new.messages[1]["tool_calls"][0]["function"]


@pytest.mark.parametrize(
    ("line", "same_as"),
    [
        ([turn("user", [{"type": "text", "text": "Hi "}, {"type": "text", "text": "you"}]), ANSWER], ["Hi you", None]),
        ([turn("user", "Hi", name=None), {**ANSWER, **NULLS}], ["Hi", None]),
        ([turn("user", "Hi"), {**ANSWER, "weight": None}], ["Hi", None]),
    ],
)
def test_parts_and_nulls_mean_what_plain_messages_mean(line: list[Any], same_as: list[Any]) -> None:
    plain = [turn("user", same_as[0]), ANSWER]
    nothing = {"tools": None, "functions": None, "parallel_tool_calls": None}
    assert read_conversation({"messages": line, **nothing}) == read_conversation({"messages": plain})


@pytest.mark.parametrize(
    "answer",
    [
        {"content": None, "refusal": "No."},
        {"refusal": "No."},
        {"content": [{"type": "refusal", "refusal": "No.", "text": None}]},
        {"content": "No.", "refusal": "Never."},
    ],
)
def test_a_refusal_is_the_answer_if_there_is_no_content(answer: dict[str, Any]) -> None:
    line = [turn("user", "Hi"), {"role": "assistant", **answer}]
    assert read_conversation({"messages": line}) == read_conversation(
        {"messages": [turn("user", "Hi"), turn("assistant", "No.")]}
    )


@pytest.mark.parametrize(
    ("roles", "answers"),
    [
        (["developer", "user", "assistant"], 1),
        (["user", "user", "assistant"], 1),
        (["assistant", "user", "assistant"], 2),
        (["user", "assistant", "assistant"], 2),
        (["system", "user", "system", "user", "assistant"], 1),
        (["system", "assistant"], 1),
    ],
)
def test_turns_need_not_alternate(tokenizer: ChatTokenizer, roles: list[str], answers: int) -> None:
    found = example({"messages": [turn(role, str(index)) for index, role in enumerate(roles)]})
    encoded = encode_example(tokenizer, found)
    assert len(encoded.spans) == answers
    assert list(encoded.tokens[: encoded.prompt_length]) == tokenizer.encode_chat(found.messages[:-1])


def test_a_name_reaches_the_template(tokenizer: ChatTokenizer) -> None:
    named = [turn("user", "Hi", name="ann"), ANSWER]
    assert example({"messages": named}).messages[0]["name"] == "ann"
    plain = example({"messages": [turn("user", "Hi"), ANSWER]})
    assert encode_example(tokenizer, example({"messages": named})) == encode_example(
        tokenizer, plain
    )  # SmolLM2's template shows none


def changed(**message: Any) -> list[dict[str, Any]]:
    return [USER, {**ANSWER, **message}]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"messages": changed(), "tool": [1]}, "the line has the unknown key 'tool'"),
        ({"messages": changed(), "parallel_tool_calls": 1}, "parallel_tool_calls is 1; it must be true or false"),
        ({"messages": changed(), "tools": {}}, "tools must be a list"),
        ({"messages": changed(), "tools": ["parcel"]}, r"tools\[0\] must be an object"),
        ({"messages": changed(), "tools": [PARCEL]}, r"tools\[0\] has the unknown key 'name'"),
        ({"messages": changed(), "tools": [{"type": "function"}]}, r"tools\[0\] must be an object"),
        ({"messages": changed(), "tools": [TOOL, TOOL]}, "tools has two functions called 'parcel'"),
        ({"messages": changed(), "tools": [TOOL], "functions": [PARCEL]}, "both tools and functions"),
        ({"messages": changed(), "functions": [{"name": "a b"}]}, r"functions\[0\]\.name is 'a b'; it has 1 to 64"),
        (
            {"messages": changed(), "functions": [{"name": "f", "parameters": "x"}]},
            r"functions\[0\]\.parameters is 'x'",
        ),
        ({"messages": [USER]}, "messages has no assistant message"),
        ({"messages": [ANSWER, USER]}, r"messages\[1\]\.role is user; the last message must be the assistant's"),
        ({"messages": [turn("bot", "x"), ANSWER]}, r"messages\[0\]\.role is 'bot'; use one of system, developer, user"),
        ({"messages": [turn("user", None), ANSWER]}, r"messages\[0\]\.content is None; it must be a string"),
        ({"messages": changed(content=None)}, r"messages\[1\]\.content is None"),
        ({"messages": changed(content="")}, r"messages\[1\]\.content is empty"),
        ({"messages": changed(content=None, refusal=" ")}, r"messages\[1\]\.refusal is empty"),
        ({"messages": changed(content=None, refusal=7)}, r"messages\[1\]\.refusal is 7; it must be a string"),
        ({"messages": [turn("user", "x", refusal="No."), ANSWER]}, r"messages\[0\] has the unknown key 'refusal'"),
        (
            {"messages": [turn("user", [{"type": "refusal", "refusal": "No."}]), ANSWER]},
            r"messages\[0\]\.content\[0\] is of the type 'refusal'",
        ),
        ({"messages": [turn("user", "x", weight=1), ANSWER]}, r"messages\[0\] has the unknown key 'weight'"),
        ({"messages": [turn("user", "x", tool_calls=[call()]), ANSWER]}, r"messages\[0\] has the unknown key 'tool_ca"),
        (
            {"messages": [turn("user", [{"type": "image_url", "image_url": {"url": "x"}}]), ANSWER]},
            r"messages\[0\]\.content\[0\] is of the type 'image_url'; only parts like",
        ),
        ({"messages": [turn("user", []), ANSWER]}, r"messages\[0\]\.content is empty"),
        ({"messages": changed(tool_calls=[{"id": "x"}])}, r"messages\[1\]\.tool_calls\[0\] must be an object"),
        ({"messages": changed(tool_calls=[call("[]")])}, r"tool_calls\[0\]\.function\.arguments is '\[\]'"),
        ({"messages": changed(tool_calls=[call("{")])}, r"tool_calls\[0\]\.function\.arguments must be a JSON obj"),
        ({"messages": changed(tool_calls=[call(7)])}, r"tool_calls\[0\]\.function\.arguments is 7"),
        ({"messages": changed(tool_calls=[call(call_id="")])}, r"tool_calls\[0\]\.id is empty"),
        ({"messages": changed(function_call={"name": "f"})}, r"messages\[1\]\.function_call\.arguments is missing"),
        (
            {"messages": [USER, turn("tool", "x", tool_call_id="c1"), ANSWER]},
            r"messages\[1\]\.tool_call_id is 'c1', w",
        ),
        ({"messages": [USER, turn("tool", "x"), ANSWER]}, r"messages\[1\]\.tool_call_id is missing"),
        ({"messages": [USER, turn("function", "x", name="parcel"), ANSWER]}, r"messages\[1\]\.name is 'parcel', which"),
        ({"messages": changed(weight=0)}, "weight is 0 for every answer"),
    ],
)
def test_what_openai_refuses_is_refused_with_its_field(line: dict[str, Any], message: str) -> None:
    with pytest.raises(LineError, match=message):
        read_conversation(line)
    with pytest.raises(DatasetInvalid, match=f"train.jsonl, line 1: .*{message}"):
        example(line)


def test_two_calls_are_answered_in_any_order() -> None:
    calls = turn("assistant", "One moment.", tool_calls=[call(), call(call_id="c2")])
    results = [turn("tool", "", tool_call_id="c2"), turn("tool", "in Oslo", tool_call_id="c1")]
    found = read_conversation({"messages": [USER, calls, *results, ANSWER], "tools": [TOOL]})
    assert [message.get("tool_call_id") for message in found.messages[2:4]] == ["c2", "c1"]


@pytest.mark.parametrize("line", [TOOLS, FUNCTIONS, {**TOOLS, "messages": TOOLS["messages"][:2]}])
def test_tool_calls_are_trained_as_transformers_renders_them(line: dict[str, Any]) -> None:
    """Each assistant turn with its end token, and nothing else."""
    tokenizer, found = hermes(), example(line)
    oracle = PreTrainedTokenizerFast(tokenizer_object=hermes_tokenizer(), chat_template=TEMPLATE)
    (encoded,) = encode_example(tokenizer, found).sequences
    whole = oracle.apply_chat_template(list(found.messages), tools=[TOOL], tokenize=False).rstrip("\n")
    assert list(encoded.tokens) == oracle.encode(whole, add_special_tokens=False)
    assert len(encoded.spans) == len(found.answers)
    for span, index in zip(encoded.spans, found.answers, strict=True):
        prompt = oracle.apply_chat_template(
            list(found.messages[:index]), tools=[TOOL], tokenize=False, add_generation_prompt=True
        )
        assert list(encoded.tokens[: span.start]) == oracle.encode(prompt, add_special_tokens=False)
        assert encoded.tokens[span.stop - 1] == END
    first = encoded.spans[0]
    assert tokenizer.decode(encoded.tokens[first.start : first.stop]).strip() == answer_text(
        "", [("parcel", {"id": "7"})]
    )


@pytest.mark.parametrize(
    "contents", [["Hi", "Hello"], ["x  12\n\n3", "é🙂 two", "again?", "yes"], ["a", "b", "c", "d", "e", "f"]]
)
def test_conversations_are_trained_as_transformers_renders_them(
    base: Base, tokenizer: ChatTokenizer, contents: list[str]
) -> None:
    oracle = AutoTokenizer.from_pretrained(base.folder)
    line = [turn(("user", "assistant")[i % 2], content) for i, content in enumerate(contents)]
    found = example({"messages": line})
    (encoded,) = encode_example(tokenizer, found).sequences
    whole = oracle.apply_chat_template(line, tokenize=False).removesuffix("\n")
    assert list(encoded.tokens) == oracle(whole, add_special_tokens=False)["input_ids"]


def test_tools_are_refused_where_the_template_has_none(tokenizer: ChatTokenizer) -> None:
    plain = hermes(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    for line, field in ((TOOLS, "tools"), ({"messages": TOOLS["messages"]}, "messages[1].tool_calls")):
        examples = read_examples(b"\n" + json.dumps(line).encode(), "train.jsonl")
        with pytest.raises(DatasetInvalid) as caught:
            check_tokens(examples, plain, 1000)
        (problem,) = caught.value.problems
        assert problem.startswith("train.jsonl, line 2: This base's chat template does not render tools")
        assert f"'{field}'" in problem
    for knowing in (hermes(), tokenizer):
        check_tokens(read_examples(json.dumps(TOOLS).encode(), "train.jsonl"), knowing, 1000)


def test_special_tokens_in_a_text_are_trained_as_text(tokenizer: ChatTokenizer) -> None:
    line = {"messages": [turn("user", "What does <|im_end|> mean?"), turn("assistant", "It, <|im_end|>, ends a turn.")]}
    encoded = encode_example(tokenizer, example(line))
    assert encoded.tokens.count(2) == 3  # the default system prompt's end, the question's and the answer's
    assert encoded.tokens[-1] == 2
    assert tokenizer.decode(encoded.tokens[encoded.prompt_length :]) == "It, <|im_end|>, ends a turn."


def test_messages_are_sent_as_they_were_read() -> None:
    sent = to_request_messages(example(TOOLS).messages)
    assert sent[1]["tool_calls"] == [call('{"id": "7"}')]
    assert sent[0] == USER and sent[3] == ANSWER
    assert read_conversation({**TOOLS, "messages": sent}).messages == example(TOOLS).messages


def test_a_tool_call_has_a_text_form() -> None:
    found = example({**TOOLS, "messages": TOOLS["messages"][:2]})
    assert found.completion == '<tool_call>\n{"name": "parcel", "arguments": {"id": "7"}}\n</tool_call>'
    assert answer_text("Sure.", []) == "Sure." and answer_text("", []) == ""


@given(text=st.text(st.characters(), min_size=1).filter(str.strip))
@hypothesis.example("a\ud800")
@hypothesis.example("\udfffa")
@hypothesis.example("\ud7ff\ue000")
def test_a_text_is_refused_if_utf_8_cannot_express_it(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        with pytest.raises(LineError, match="lone surrogate"):
            read_text({"content": text}, "content", "content")
    else:
        assert read_text({"content": text}, "content", "content") == text
