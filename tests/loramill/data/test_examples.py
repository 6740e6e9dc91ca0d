"""Validation of training data: each bad file is refused with file, line, field and what to do."""

from __future__ import annotations

import contextlib
import gzip
import json
import re
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from loramill.data.encoding import check_tokens, encode_example
from loramill.data.examples import Examples, compare_splits, read_examples
from loramill.data.problems import MAX_LISTED
from loramill.data.tokenizer import ChatTokenizer
from loramill.errors import DatasetInvalid

TENANTS = Path(__file__).parents[3] / "examples" / "tenants"


def row(*contents: str, roles: str = "sua", **more: object) -> str:
    names = {"s": "system", "u": "user", "a": "assistant", "t": "tool", "d": "developer"}
    pairs = zip(roles, contents, strict=True)
    return json.dumps({"messages": [{"role": names[role], "content": content} for role, content in pairs], **more})


def pair(prompt: object, completion: object, **more: object) -> str:
    return json.dumps({"prompt": prompt, "completion": completion, **more})


def weighted(first: object, second: object, **of: str) -> str:
    """Two answers with these weights (None: no weight); `weight` names another role that gets a weight."""
    roles = ("user", "assistant", "user", "assistant")
    weights = ({}, {"weight": first}, {}, {"weight": second})
    messages = [
        {"role": role, "content": str(index)} | {key: value for key, value in own.items() if value is not None}
        for index, (role, own) in enumerate(zip(roles, weights, strict=True))
    ]
    if of:
        messages[roles.index(of["weight"])]["weight"] = 1
    return json.dumps({"messages": messages})


GOOD = row("Label it.", "I lost my card", "lost_card")


def read(*lines: str, minimum: int = 1) -> Examples:
    return read_examples("\n".join(lines).encode(), "train.jsonl", minimum=minimum)


def problems(raw: bytes, minimum: int = 1) -> tuple[str, ...]:
    with pytest.raises(DatasetInvalid) as caught:
        read_examples(raw, "train.jsonl", minimum=minimum)
    assert all(problem in caught.value.message for problem in caught.value.problems)
    return caught.value.problems


def test_chat_and_completion_examples() -> None:
    chat = read(GOOD, row("Hi", "Hello", "Bye", "See you", roles="uaua"))
    assert chat.warnings == ()
    first, second = chat.examples
    assert [message["role"] for message in first.messages] == ["system", "user", "assistant"]
    assert (first.prompt, first.completion, first.line) == (None, "lost_card", 1)
    assert (second.completion, second.line, len(second.messages)) == ("See you", 2, 4)
    (plain,) = read(pair("2+2=", " 4")).examples
    assert (plain.messages, plain.prompt, plain.completion) == ((), "2+2=", " 4")


@pytest.mark.parametrize(
    ("line", "for_last", "for_all"),
    [
        (weighted(None, None), [(3, 1.0)], [(1, 1.0), (3, 1.0)]),
        (weighted(0, 1), [(3, 1.0)], [(3, 1.0)]),
        (weighted(1, 0), [(1, 1.0)], [(1, 1.0)]),
        (weighted(0.5, 2), [(1, 0.5), (3, 2.0)], [(1, 0.5), (3, 2.0)]),
        (weighted(0, None), [(3, 1.0)], [(3, 1.0)]),
        (weighted(None, 0), [(1, 1.0)], [(1, 1.0)]),  # as in OpenAI's format, a missing weight is 1
    ],
)
def test_weights_decide_which_answers_are_trained_and_how_much(line: str, for_last: object, for_all: object) -> None:
    (found,) = read(line).examples
    assert (found.supervised_answers("last"), found.supervised_answers("all")) == (for_last, for_all)


@pytest.mark.parametrize(
    ("line", "last"),
    [
        (weighted(None, None), [(3, 1.0)]),
        (weighted(None, 1), [(3, 1.0)]),  # a weight on the last answer does not enable the first
        (weighted(1, 2), [(3, 2.0)]),
        (weighted(1, 0), []),
    ],
)
def test_training_can_be_limited_to_the_last_answer(line: str, last: object) -> None:
    (found,) = read(line).examples
    assert found.supervised_answers("only_last") == last


def test_training_on_a_last_answer_of_weight_0_is_refused(tokenizer: ChatTokenizer) -> None:
    with pytest.raises(DatasetInvalid, match=r"line 1: messages\[3\]\.weight is 0, and only the last answer"):
        check_tokens(read(weighted(1, 0)), tokenizer, 100, "only_last")


def test_completion_data_may_have_a_weight() -> None:
    assert [found.weights for found in read(pair("a", "b"), pair("c", "d", weight=2)).examples] == [None, (2.0,)]


def test_windows_line_ends_and_blank_lines_keep_line_numbers() -> None:
    raw = f"\r\n{GOOD}\r\n  \r\n\r\n{row('Hi', 'Hello', roles='ua')}\r\n".encode()
    assert [example.line for example in read_examples(raw, "train.jsonl").examples] == [2, 5]
    assert (
        read_examples(raw.replace(b"\r\n", b"\n"), "train.jsonl").examples == read_examples(raw, "train.jsonl").examples
    )


def test_line_separators_within_a_text_do_not_end_a_line() -> None:
    text = "a\u2028b\u0085c"
    raw = json.dumps({"prompt": text, "completion": "x"}, ensure_ascii=False).encode()
    assert read_examples(raw, "train.jsonl").examples[0].prompt == text


def test_an_empty_system_message_is_allowed() -> None:
    assert read(row("", "Hi", "Hello")).examples[0].messages[0]["content"] == ""


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "it is not JSON: .* at character 2"),
        ('{"prompt": "a", "completion": "b", "weight": 1e999}', "it contains the number 1e999, which is too large"),
        ("hello", "it is not JSON"),
        (GOOD + GOOD, "it is not JSON: Extra data"),
        ('{"prompt": ' + "1" * 5000 + "}", "it contains an integer of more than 4300 digits"),
        ("[" * 100_000, "it is nested too deeply"),
        ('{"prompt": "a", "prompt": "b", "completion": "c"}', "the key 'prompt' twice"),
        ("[]", r'it is not an object; write \{"messages"'),
        ("{}", r'it has no messages; write \{"messages"'),
        ('{"text": "x"}', "it has no messages"),
        ('{"messages": []}', "messages must be a list with at least"),
        ('{"messages": "Hi"}', "messages must be a list with at least"),
        ('{"messages": ["Hi"]}', r"messages\[0\] must be an object"),
        (
            '{"messages": [{"content": "Hi"}]}',
            r"messages\[0\]\.role is None; use one of system, developer, user, assistant",
        ),
        ('{"messages": [{"role": ["user"], "content": "Hi"}]}', r"messages\[0\]\.role is \['user'\]"),
        ('{"messages": [{"role": "user"}]}', r"messages\[0\]\.content is missing"),
        ('{"messages": [{"role": "user", "content": null}]}', r"messages\[0\]\.content is None; it must be a string"),
        (row("x", "y", "z", roles="uau"), r"messages\[2\]\.role is user; the last message must be the assistant's"),
        (row("x", "y", roles="su"), r"messages has no assistant message"),
        (row("x", "y", ""), r"messages\[2\]\.content is empty"),
        (row("x", "y", " \n\t"), r"messages\[2\]\.content is empty"),
        (row("x", "", "z"), r"messages\[1\]\.content is empty"),
        (row("x", "y", "\ud83d"), r"messages\[2\]\.content contains a lone surrogate"),
        (row("x", "y", "z", weight=1), "the line has the unknown key 'weight'; it may have messages, tools,"),
        (pair("x", ""), "completion is empty"),
        (pair("", "y"), "prompt is empty"),
        (pair("x", 4), "completion is 4; it must be a string"),
        (pair("x", "y", id=7), "unknown key 'id'; it may have prompt, completion, weight only"),
        (pair("x", "y", weight="1"), "weight is '1'; it must be a number from 0"),
        (pair("x", "y", weight=True), "weight is True; it must be a number from 0"),
        (pair("x", "y", weight=-1), "weight is -1; it must be a number from 0"),
        (pair("x", "y", weight=1e7), r"weight is 10000000.0; it must be a number from 0 \(not trained\) to 1e\+06"),
        (pair("x", "y", weight=float("nan")), "it is not JSON: NaN is not a number"),
        (pair("x", "y", weight=float("inf")), "it is not JSON: Infinity is not a number"),
        (pair("x", "y", weight=0), "weight is 0 for every answer, so that nothing is trained"),
        (weighted(0, 0), "weight is 0 for every answer"),
        (weighted(0, None, weight="user"), r"messages\[0\] has the unknown key 'weight'"),
        (weighted(None, [1]), r"messages\[3\]\.weight is \[1\]; it must be a number"),
        ('{"prompt": "x"}', "completion is missing"),
        ('{"completion": "x"}', "prompt is missing"),
        (pair("x", "y"), "it has another format than line 1"),
    ],
)
def test_a_bad_line_is_named(line: str, message: str) -> None:
    (problem,) = problems(f"{GOOD}\n\n{line}\n{GOOD}\n".encode())
    assert re.match(f"train.jsonl, line 3: .*{message}", problem)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "train.jsonl: it is empty"),
        (b"\n \r\n", "train.jsonl: it is empty"),
        (b"\xef\xbb\xbf", "train.jsonl: it is empty"),
        (GOOD.encode("utf-16"), "train.jsonl: it is text in UTF-16; upload JSONL in UTF-8"),
        (GOOD.encode("utf-16-le"), "train.jsonl: it is text in UTF-16"),
        (GOOD.encode("utf-16-be"), "train.jsonl: it is text in UTF-16"),
        (gzip.compress(GOOD.encode()), "train.jsonl: it is compressed by gzip"),
        (b"PAR1", "train.jsonl: it is a Parquet file"),
        (b'{"prompt": "caf\xe9"}', "line 1: byte 16 is not UTF-8 (in Windows-1252 it is '\u00e9'); save the file as"),
        (b'{"prompt": "\x81"}', "line 1: byte 13 is not UTF-8; save the file as"),
    ],
)
def test_a_bad_file_is_named(raw: bytes, message: str) -> None:
    assert message in problems(raw)[0]


def test_a_byte_order_mark_is_accepted_at_every_line() -> None:
    """Concatenated files have one in the middle."""
    raw = b"\xef\xbb\xbf" + f"{GOOD}\n".encode()
    assert [example.line for example in read_examples(raw + raw, "train.jsonl").examples] == [1, 2]


def test_every_problem_is_found_at_once() -> None:
    raw = b"\xef\xbb\xbf{\n" + GOOD.encode() + b"\n\xff\n{}"
    assert [problem.split(":")[0] for problem in problems(raw)] == [f"train.jsonl, line {n}" for n in (1, 3, 4)]


def test_many_problems_are_counted_and_the_first_listed() -> None:
    with pytest.raises(DatasetInvalid, match=f"train.jsonl has 57 problems; the first {MAX_LISTED}:") as caught:
        read(GOOD, *["{}"] * 57)
    assert len(caught.value.problems) == MAX_LISTED
    assert caught.value.problems[0].startswith("train.jsonl, line 2:")


def test_too_few_examples() -> None:
    assert "it has 1 example, and at least 10 are needed" in problems(GOOD.encode(), minimum=10)[0]
    assert len(read(*[row("Hi", str(n), roles="ua") for n in range(10)], minimum=10).examples) == 10
    many = b"{}\n" * 10
    assert not any("at least" in problem for problem in problems(many, minimum=10))


def test_an_unexpected_value_is_shown_short_and_printable() -> None:
    (problem,) = problems(json.dumps({"messages": [{"role": "\x1b[31m" + "x" * 500, "content": "y"}]}).encode())
    assert problem.isprintable()
    assert len(problem) < 150


def test_repeated_examples_are_a_warning() -> None:
    (warning,) = read(GOOD, pair_free := row("Hi", "Hello", roles="ua"), GOOD, pair_free, GOOD).warnings
    assert warning.startswith(
        "train.jsonl: 3 examples repeat earlier ones (line 3 repeats line 1, line 4 repeats line 2"
    )
    assert warning.endswith("training uses every repetition.")
    (warning,) = read(GOOD, GOOD).warnings
    assert warning.startswith("train.jsonl: 1 example repeats an earlier one (line 2 repeats line 1)")
    (warning,) = read(*[GOOD] * 50).warnings
    assert warning.count("repeats") == MAX_LISTED
    assert "and 29 more" in warning


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        ("a.jsonl", "line"),
        ("A.JSONL.gz", "line"),
        ("a.ndjson", "line"),
        ("upload", "line"),
        ("a.csv", "row"),
        ("a.csv.gz", "row"),
        ("a.tsv", "row"),
        ("a.json", "row"),
        ("a.parquet", "row"),
    ],
)
def test_places_are_lines_of_jsonl_and_rows_of_tables(tokenizer: ChatTokenizer, name: str, unit: str) -> None:
    good, other, bad = row("Hi", "Hello", roles="ua"), row("Hi", "Good day", roles="ua"), "3"
    examples = read_examples(f"{good}\n{other}\n{good}\n".encode(), name)
    assert f"({unit} 3 repeats {unit} 1)" in examples.warnings[0]
    assert f"({unit} 1 is line 2, {unit} 2 is line 1" in compare_splits(read(other, good), examples)[0]
    assert f"{name}, {unit} 2: it has" in token_problems(examples, tokenizer, 3)[1]
    with pytest.raises(DatasetInvalid, match=f"{name}, {unit} 2: it is not an object"):
        read_examples(f"{good}\n{bad}\n".encode(), name)


def test_the_same_answer_to_another_question_is_not_a_repetition() -> None:
    assert read(row("a", "b", roles="ua"), row("c", "b", roles="ua"), row("a", "c", roles="ua")).warnings == ()
    assert read(pair("a", "b"), pair("ab", "b")).warnings == ()


def test_validation_examples_that_are_in_train_are_a_warning() -> None:
    train = read(GOOD, row("Hi", "Hello", roles="ua"), GOOD)
    valid = read_examples(f"{row('Hi', 'Good day', roles='ua')}\n{GOOD}".encode(), "valid.jsonl")
    (warning,) = compare_splits(train, valid)
    assert warning.startswith("valid.jsonl: 1 of 2 examples are in train.jsonl too (line 2 is line 1)")
    assert compare_splits(read(row("Hi", "Hello", roles="ua")), valid) == ()


# With the base's tokenizer


def token_problems(examples: Examples, tokenizer: ChatTokenizer, max_length: int = 100) -> tuple[str, ...]:
    with pytest.raises(DatasetInvalid) as caught:
        check_tokens(examples, tokenizer, max_length)
    return caught.value.problems


def test_an_example_may_be_as_long_as_the_limit_and_no_longer(tokenizer: ChatTokenizer) -> None:
    examples = read("", GOOD)
    encoded = encode_example(tokenizer, examples.examples[0])
    count, prompt = len(encoded.tokens), encoded.prompt_length
    check_tokens(examples, tokenizer, count)
    (problem,) = token_problems(examples, tokenizer, count - 1)
    assert problem.startswith(
        f"train.jsonl, line 2: it has {count} tokens (prompt {prompt}, completion {count - prompt}), "
        f"the limit is {count - 1}; shorten it or raise max_length"
    )
    assert "nothing is truncated" in problem
    (problem,) = token_problems(examples, tokenizer, prompt)
    assert "the prompt alone fills it" in problem


def test_special_tokens_may_be_written_as_text_anywhere(tokenizer: ChatTokenizer) -> None:
    lines = [row(token, f"Hello{token}", roles="ua") for token in ("<|im_start|>", "<|im_end|>", "<|endoftext|>")]
    check_tokens(read(GOOD, *lines, row("How do I copy?", "cp <filename> there", roles="ua")), tokenizer, 100)
    check_tokens(read(pair("<|im_end|>", "<|im_end|>")), tokenizer, 100)


def test_a_completion_without_tokens_is_a_problem(tokenizer: ChatTokenizer) -> None:
    (problem,) = token_problems(read(pair("Which one?", "\x04")), tokenizer)
    assert "the completion has no tokens" in problem


def test_chat_data_for_a_base_without_a_template(tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "_template", None)
    (problem,) = token_problems(read(GOOD), tokenizer)
    assert problem.startswith("train.jsonl, line 1: This base has no chat template")


def test_every_split_of_every_example_tenant_is_valid(tokenizer: ChatTokenizer) -> None:
    for folder in sorted(path for path in TENANTS.iterdir() if path.is_dir()):
        splits = {}
        for split in ("train", "valid", "test"):
            splits[split] = read_examples(
                (folder / f"{split}.jsonl").read_bytes(), f"{folder.name}/{split}", minimum=10
            )
            check_tokens(splits[split], tokenizer, 192)
        assert compare_splits(splits["train"], splits["valid"]) == ()


# Before any compute

DEFECTS: dict[str, tuple[str, str]] = {
    "not json": ("{", "it is not JSON"),
    "two objects": (GOOD + GOOD, "it is not JSON"),
    "a list": ("[]", "it is not an object"),
    "a key twice": ('{"prompt": "a", "prompt": "b", "completion": "c"}', "twice"),
    "no messages": ('{"text": "x"}', "it has no messages"),
    "another form": (pair("x", "y"), "it has another format than line 1"),
    "an unknown key": (row("x", "y", roles="ua", id=7), "unknown key 'id'"),
    "messages no list": ('{"messages": "Hi"}', "messages must be a list"),
    "no message": ('{"messages": []}', "messages must be a list"),
    "a message no object": ('{"messages": ["Hi"]}', "messages[0] must be an object"),
    "a message's unknown key": (
        '{"messages": [{"role": "user", "content": "x", "names": "y"}]}',
        "messages[0] has the unknown key 'names'",
    ),
    "no role": ('{"messages": [{"content": "Hi"}]}', "messages[0].role is None"),
    "an unknown role": ('{"messages": [{"role": "bot", "content": "x"}]}', "messages[0].role is 'bot'"),
    "no assistant": (row("x", "y", roles="su"), "messages has no assistant message"),
    "no answer": (row("x", "y", "z", roles="uau"), "messages[2].role is user"),
    "no content": ('{"messages": [{"role": "user"}]}', "messages[0].content is missing"),
    "content no string": ('{"messages": [{"role": "user", "content": null}]}', "messages[0].content is None"),
    "an empty question": (row("x", "", "z"), "messages[1].content is empty"),
    "an empty answer": (row("x", "y", " \n"), "messages[2].content is empty"),
    "half a character": (row("x", "y", "\ud83d"), "messages[2].content contains a lone surrogate"),
    "a weight no number": (weighted(1, "2"), "messages[3].weight is '2'"),
    "a weight below 0": (weighted(-1, 1), "messages[1].weight is -1"),
    "a weight of a question": (weighted(1, 1, weight="user"), "messages[0] has the unknown key 'weight'"),
    "nothing that is supervised": (weighted(0, 0), "weight is 0 for every answer"),
    "too long a prompt": (row("x " * 200, "y", roles="ua"), "the prompt alone fills it"),
    "too long an answer": (row("x", "y " * 80, roles="ua"), "shorten it or raise max_length"),
    "an answer without tokens": (row("x", "\x04", roles="ua"), "the completion has no tokens"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_is_refused_before_any_compute(tokenizer: ChatTokenizer, defect: str) -> None:
    """The error has its line and field, and no other problem: the lines around it are valid."""
    line, message = DEFECTS[defect]
    with pytest.raises(DatasetInvalid) as caught:
        check_tokens(read(GOOD, "", line, GOOD), tokenizer, 96, train_on="all")
    (problem,) = caught.value.problems
    assert problem.startswith("train.jsonl, line 3: ")
    assert message in problem


# Arbitrary input

values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["messages", "role", "content", "prompt", "completion", "x"]), inner, max_size=3
        )
    ),
    max_leaves=8,
)
messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system"]), "content": values})
)
rows = st.builds(json.dumps, values | st.fixed_dictionaries({"messages": messages})).map(str.encode)


@settings(max_examples=300)
@given(
    parts=st.lists(st.binary(max_size=20) | rows | st.just(GOOD.encode()), max_size=5),
    end=st.sampled_from([b"\n", b"\r\n"]),
)
@example(parts=[b'{"a":' * 100_000], end=b"\n")
def test_arbitrary_bytes_are_read_or_refused(parts: list[bytes], end: bytes) -> None:
    with contextlib.suppress(DatasetInvalid):
        examples = read_examples(end.join(parts), "train.jsonl").examples
        assert all(example.completion.strip() for example in examples)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Q", "completion": "A"},
        {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]},
        {"prompt": "Q", "completion": "A", "label": True},
    ],
)
def test_a_line_says_something_about_itself(row: dict[str, object]) -> None:
    metadata = {"topic": "tax", "year": 2026, "urgent": False}
    plain, tagged = (
        read_examples(json.dumps(each).encode(), "one.jsonl").examples[0]
        for each in (row | {"metadata": None}, row | {"metadata": metadata})
    )
    assert (plain.metadata, tagged.metadata) == ({}, metadata)
    assert plain.content_key == tagged.content_key


@pytest.mark.parametrize(
    ("metadata", "problem"),
    [("tax", "metadata is 'tax'; it must be an object"), ({"a": ["b"]}, r"metadata.a is \['b'\]; it must be text")],
)
def test_metadata_of_other_forms_is_refused(metadata: object, problem: str) -> None:
    row = {"prompt": "Q", "completion": "A", "metadata": metadata}
    with pytest.raises(DatasetInvalid, match=problem):
        read_examples(json.dumps(row).encode(), "one.jsonl")
