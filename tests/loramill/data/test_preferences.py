"""Preference data: OpenAI's and TRL's formats mean the same, and each bad line is refused with field and fix."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loramill.data.encoding import check_tokens, encode_example, encode_pair
from loramill.data.examples import Examples, compare_splits, read_examples, row_format
from loramill.data.ingest import read_source
from loramill.data.tokenizer import ChatTokenizer
from loramill.errors import DatasetInvalid


def turn(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


PROMPT = [turn("system", "Be brief."), turn("user", "Hi"), turn("assistant", "Hello."), turn("user", "Open?")]
GOOD, BAD = [turn("assistant", "Yes.")], [turn("assistant", "I think we might be.")]
TOOLS = [{"type": "function", "function": {"name": "hours", "parameters": {"type": "object", "properties": {}}}}]
OPENAI = {"input": {"messages": PROMPT}, "preferred_output": GOOD, "non_preferred_output": BAD}
TRL = {"prompt": PROMPT, "chosen": GOOD, "rejected": BAD}
TEXTS = {"prompt": "Open?", "chosen": " Yes.", "rejected": " Maybe."}
LABELED = {"messages": [*PROMPT, *GOOD], "label": True}


def read(*lines: object, name: str = "train.jsonl") -> Examples:
    return read_examples("\n".join(map(json.dumps, lines)).encode(), name)


def problem(*lines: object) -> str:
    with pytest.raises(DatasetInvalid) as caught:
        read(*lines)
    return "\n".join(caught.value.problems)


@pytest.mark.parametrize(
    "line",
    [
        TRL,
        {"chosen": [*PROMPT, *GOOD], "rejected": [*PROMPT, *BAD]},
        {"prompt": "Open?", "chosen": [*PROMPT, *GOOD], "rejected": [*PROMPT, *BAD]},
        {**OPENAI, "input": {"messages": PROMPT, "tools": [], "parallel_tool_calls": True}},
    ],
)
def test_pairs_of_messages_are_the_same_in_all_formats(line):
    assert read(line) == read(OPENAI)


def test_a_pair_has_two_answers_to_one_prompt():
    (example,) = read(OPENAI).examples
    assert example.kind == "preference"
    assert [side.messages[:-1] for side in example.sides] == [tuple(PROMPT)] * 2
    assert [side.completion for side in example.sides] == ["Yes.", "I think we might be."]
    assert [side.weights for side in example.sides] == [(0, 1)] * 2
    (example,) = read(TEXTS).examples
    assert [(side.prompt, side.completion) for side in example.sides] == [("Open?", " Yes."), ("Open?", " Maybe.")]


@pytest.mark.parametrize("label", [True, False])
def test_labeled_answers_are_the_same_in_all_formats(label):
    found = read({"prompt": PROMPT, "completion": GOOD, "label": label})
    assert found == read({"messages": [*PROMPT, *GOOD], "label": label})
    assert (found.kind, found.examples[0].label) == ("labeled", label)
    (text,) = read({"prompt": "Open?", "completion": " Yes.", "label": label}).examples
    assert (text.prompt, text.completion, text.label) == ("Open?", " Yes.", label)


def test_tools_belong_to_both_answers():
    with_tools = read({**OPENAI, "input": {"messages": PROMPT, "tools": TOOLS}})
    assert with_tools == read({**TRL, "tools": TOOLS})
    assert all(side.tools for side in with_tools.examples[0].sides)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ({**OPENAI, "input": "Hi"}, "input is 'Hi'; it must be an object"),
        ({**OPENAI, "input": {"messages": []}}, "input.messages must be a list with at least a user's message"),
        ({**OPENAI, "input": {"messages": [turn("elf", "a")]}}, "input.messages[0].role is 'elf'"),
        ({**OPENAI, "input": {"messages": PROMPT, "n": 1}}, "input has the unknown key 'n'"),
        ({**OPENAI, "input": {"messages": PROMPT, "tools": [1]}}, "input.tools[0] must be an object"),
        ({**OPENAI, "id": 3}, "the line has the unknown key 'id'; it may have input, preferred_output, non_pref"),
        ({"input": {"messages": PROMPT}, "preferred_output": GOOD}, "non_preferred_output is None; it must be a list"),
        ({**OPENAI, "preferred_output": GOOD + BAD}, "preferred_output has 2 messages; it must be a list of one"),
        ({**OPENAI, "preferred_output": [turn("user", "a")]}, "preferred_output: the role of the answer is user"),
        ({**OPENAI, "preferred_output": [turn("assistant", " ")]}, "preferred_output[0].content is empty"),
        ({**OPENAI, "preferred_output": [turn("assistant", "a", weight=1)]}, "preferred_output[0] has a weight"),
        ({**OPENAI, "non_preferred_output": GOOD}, "both answers are the same"),
        ({**TEXTS, "rejected": " Yes."}, "both answers are the same"),
        ({**TEXTS, "rejected": BAD}, "chosen is ' Yes.'; it must be a list of messages, as rejected is"),
        ({"prompt": "Open?", "chosen": "Yes"}, "rejected is missing; add it"),
        ({"chosen": "Yes", "rejected": "No"}, "prompt is missing; add it"),
        ({**TEXTS, "tools": TOOLS}, "tools belong to messages"),
        ({**TRL, "prompt": []}, "chosen and rejected begin with different messages; write the prompt as a list"),
        ({"chosen": [*PROMPT, *GOOD], "rejected": [*PROMPT, *BAD, *PROMPT]}, "rejected has 5 messages after the 4"),
        ({"chosen": [*PROMPT, *GOOD], "rejected": [*PROMPT, *GOOD]}, "both answers are the same"),
        (
            {"chosen": [*PROMPT], "rejected": [*PROMPT[:-1], turn("user", "b")]},
            "chosen: the role of the answer is user",
        ),
        ({**LABELED, "label": "yes"}, "label is 'yes'; it must be true (a good answer) or false"),
        ({**LABELED, "label": 1}, "label is 1; it must be true"),
        ({"messages": PROMPT, "label": True}, "messages: the role of the answer is user"),
        (
            {"messages": [turn("user", "a"), turn("assistant", "b", weight=0)], "label": True},
            "messages[1] has a weight",
        ),
        (
            {"prompt": PROMPT, "completion": "Yes", "label": True},
            "completion is 'Yes'; it must be a list of one message",
        ),
        ({"prompt": "a", "completion": GOOD, "label": True}, "prompt is 'a'; it must be a list of messages"),
    ],
)
def test_a_bad_line_is_named(line, expected):
    assert f"train.jsonl, line 2: {expected}" in problem(OPENAI if "label" not in line else LABELED, line)


@pytest.mark.parametrize("other", [TEXTS, LABELED, {"messages": [*PROMPT, *GOOD]}])
def test_a_file_has_one_kind_and_one_format(other):
    assert problem(OPENAI, other).endswith("line 2: it has another format than line 1; use one format per file.")


def test_a_label_that_is_null_is_none():
    assert read({"prompt": "a", "completion": "b", "label": None}).kind == "supervised"


def test_repeated_pairs_and_pairs_of_both_splits_are_warnings():
    other = {**OPENAI, "non_preferred_output": [turn("assistant", "No.")]}
    assert not read(OPENAI, other).warnings
    assert "line 2 repeats line 1" in read(OPENAI, TRL).warnings[0]
    assert not read(LABELED, {**LABELED, "label": False}).warnings
    (warning,) = compare_splits(read(OPENAI, other), read(other, name="valid.jsonl"))
    assert "line 1 is line 2" in warning


@pytest.mark.parametrize(
    ("line", "expected"),
    [(OPENAI, ("preference", True)), (TEXTS, ("preference", False)), (LABELED, ("labeled", True))],
)
def test_the_format_of_a_row_is_known(line, expected):
    assert row_format(json.dumps(line).encode()) == expected


def test_only_the_answers_are_trained(tokenizer: ChatTokenizer):
    for line in (OPENAI, TEXTS):
        (example,) = read(line).examples
        pair = encode_pair(tokenizer, example)
        for side, text in zip((pair.chosen, pair.rejected), (side.completion for side in example.sides), strict=True):
            (span,) = side.spans
            assert tokenizer.decode_with_special_tokens(side.tokens[span.start : span.stop - 1]) == text
            assert side.tokens[-1] in tokenizer.stop_ids
        assert pair.chosen.tokens[: pair.chosen.prompt_length] == pair.rejected.tokens[: pair.rejected.prompt_length]


def test_both_answers_count_and_neither_is_cut(tokenizer: ChatTokenizer):
    examples = read(OPENAI)
    pair = encode_pair(tokenizer, examples.examples[0])
    short, long = len(pair.chosen.tokens), len(pair.rejected.tokens)
    assert list(check_tokens(examples, tokenizer, long)) == [short + long]
    with pytest.raises(DatasetInvalid, match=rf"line 1: with its rejected answer it has {long} tokens") as caught:
        check_tokens(examples, tokenizer, long - 1)
    assert len(caught.value.problems) == 1
    with pytest.raises(DatasetInvalid) as caught:
        check_tokens(examples, tokenizer, short - 1)
    assert len(caught.value.problems) == 2


def test_answers_of_the_same_tokens_are_a_problem(tokenizer: ChatTokenizer):
    examples = read({"prompt": "a", "chosen": "b\x04", "rejected": "b"})
    with pytest.raises(DatasetInvalid, match="line 1: Both answers have the same tokens"):
        check_tokens(examples, tokenizer, 100)
    examples = read({"prompt": "a", "chosen": "b", "rejected": "\x04"})
    with pytest.raises(DatasetInvalid, match="line 1: the rejected completion has no tokens"):
        check_tokens(examples, tokenizer, 100)


texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12).filter(str.strip)
prompts = st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), texts), min_size=1, max_size=4)


@settings(max_examples=60)
@given(prompts, st.lists(texts, min_size=2, max_size=2, unique=True))
def test_any_pair_is_read_as_it_was_written(prompt, answers):
    messages = [turn(role, content) for role, content in prompt]
    good, bad = ([turn("assistant", answer)] for answer in answers)
    lines = [
        {"input": {"messages": messages}, "preferred_output": good, "non_preferred_output": bad},
        {"prompt": messages, "chosen": good, "rejected": bad},
        {"chosen": [*messages, *good], "rejected": [*messages, *bad]},
    ]
    found = [read(line) for line in lines]
    assert found[0] == found[1] == found[2]
    sides = found[0].examples[0].sides
    assert [list(side.messages) for side in sides] == [[*messages, *good], [*messages, *bad]]
    labeled = [read({"messages": [*messages, *good], "label": label}).examples[0] for label in (True, False)]
    assert [each.label for each in labeled] == [True, False]
    assert all(each.messages == sides[0].messages for each in labeled)


@settings(max_examples=25)
@given(texts, st.lists(texts, min_size=2, max_size=2, unique=True))
def test_any_pair_trains_as_its_answers_do(tokenizer: ChatTokenizer, prompt, answers):
    (example,) = read({"prompt": [turn("user", prompt)], **{
        key: [turn("assistant", answer)] for key, answer in zip(("chosen", "rejected"), answers, strict=True)
    }}).examples  # fmt: skip
    singles = read(*({"messages": [turn("user", prompt), turn("assistant", answer)]} for answer in answers)).examples
    expected = [encode_example(tokenizer, single) for single in singles]
    if expected[0].tokens == expected[1].tokens:
        with pytest.raises(DatasetInvalid, match="the same tokens"):
            encode_pair(tokenizer, example)
        return
    pair = encode_pair(tokenizer, example)
    assert [(side.tokens, side.spans) for side in (pair.chosen, pair.rejected)] == [
        (single.tokens, single.spans) for single in expected
    ]


def test_files_of_preferences_are_recognized(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text(json.dumps(OPENAI))
    (tmp_path / "b.jsonl").write_text(json.dumps(TRL))
    (tmp_path / "c.csv").write_text("prompt,chosen,rejected\nOpen?, Yes., Maybe.\n")
    pq.write_table(pa.Table.from_pylist([{**TRL, "score": 0.5}]), tmp_path / "d.parquet")
    found = {file.name: read_source(file) for file in sorted(tmp_path.iterdir())}
    examples = {name: read_examples(source.content, "train.jsonl") for name, source in found.items()}
    assert examples["a.jsonl"] == examples["b.jsonl"] == examples["d.parquet"] == read(OPENAI)
    assert examples["c.csv"] == read(TEXTS)
    assert found["a.jsonl"].format == ("JSONL, OpenAI's preferences (input, preferred_output, non_preferred_output)")
    assert found["c.csv"].format == "CSV, preferences (chosen, rejected, prompt)"
    assert found["d.parquet"].warnings == ("d.parquet: unused columns: score.",)
    renamed = read_source(tmp_path / "c.csv", {"prompt": "chosen", "chosen": "prompt", "rejected": "rejected"})
    assert json.loads(renamed.content) == {"prompt": " Yes.", "chosen": "Open?", "rejected": " Maybe."}


def test_files_of_labels_are_recognized(tmp_path: Path):
    (tmp_path / "a.csv").write_text("prompt,completion,label\nOpen?, Yes.,True\n")
    (tmp_path / "b.jsonl").write_text(json.dumps({"prompt": PROMPT, "completion": GOOD, "label": False}))
    pq.write_table(pa.Table.from_pylist([LABELED]), tmp_path / "c.parquet")
    found = [read_examples(read_source(file).content, "x.jsonl") for file in sorted(tmp_path.iterdir())]
    assert [each.examples[0].label for each in found] == [True, False, True]
    assert found[1].examples[0].messages == found[2].examples[0].messages
    (tmp_path / "a.csv").write_text("prompt,completion,label\nOpen?, Yes.,travel\n")
    with pytest.raises(DatasetInvalid, match=r"row 1, column label: it is 'travel'; it must be true \(a good answer\)"):
        read_source(tmp_path / "a.csv")
    chosen = read_source(tmp_path / "a.csv", {"prompt": "prompt", "completion": "completion"})
    assert json.loads(chosen.content) == {"prompt": "Open?", "completion": " Yes."}
