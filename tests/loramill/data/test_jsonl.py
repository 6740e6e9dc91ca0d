"""JSONL is split and read strictly: what is not JSON, or what only some readers accept, is refused with a reason."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramill.data import jsonl
from loramill.data.filetype import detect_kind
from loramill.errors import DatasetInvalid

texts = st.text(st.characters(exclude_categories=["Cs"]))
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=10,
)


@given(st.lists(values), st.booleans(), st.sampled_from(["\n", "\r\n"]))
def test_lines_are_read_as_they_were_written(items: list[Any], escaped: bool, end: str) -> None:
    raw = "".join(json.dumps(item, ensure_ascii=escaped) + end for item in items).encode()
    assert [jsonl.parse(row) for _, row in jsonl.iter_rows(raw)] == items
    assert [number for number, _ in jsonl.iter_rows(io.BytesIO(raw))] == [*range(1, len(items) + 1)]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085", "\x7f"])
def test_only_a_line_feed_ends_a_line(separator: str) -> None:
    row = json.dumps({"a": f"x{separator}y"}, ensure_ascii=False)
    ((_, first), (number, _)) = jsonl.iter_rows(f"{row}\n\x0c\n{row}".encode())
    assert (jsonl.parse(first), number) == ({"a": f"x{separator}y"}, 3)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' twice"),
        (b"[NaN]", "NaN is not a number"),
        (b"[-Infinity]", "-Infinity is not a number"),
        (b"[1e400]", "the number 1e400, which is too large"),
        (b"[" + b"9" * 4301 + b"]", "more than 4300 digits"),
        (b'{"a": ["x", "\\ud83d"]}', r"a\[1\] contains a lone surrogate"),
        (b'{"\\udc00": 1}', "a key of the object contains a lone surrogate"),
        (b"[" * 65 + b"]" * 65, "nested too deeply, more than 64"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'"' + b"x" * jsonl.MAX_LINE + b'"', "longer than 16 MiB"),
        (b'"a\tb"', "it is not JSON: Invalid control character at"),
        (b"{'a': 1}", "it is not JSON: .* at character 2"),
        (b"", "it is not JSON"),
    ],
)
def test_invalid_json_is_refused_with_a_reason(row: bytes, message: str) -> None:
    with pytest.raises(DatasetInvalid, match=message):
        jsonl.parse(row)


@pytest.mark.parametrize(
    "value", [10**300, -(2**64), "\U0001f600", [[]] * 100, {"a": ["[{" * 100]}, json.loads("[" * 64 + "]" * 64)]
)
def test_large_and_nested_values_are_kept(value: Any) -> None:
    assert jsonl.parse(json.dumps(value)) == value


def test_a_line_that_is_too_long_does_not_hide_others() -> None:
    long = b'"' + b"x" * (2 * jsonl.MAX_LINE) + b'"'
    found = [*jsonl.iter_rows(b"1\n" + long + b"\n2\n" + long)]
    assert [number for number, _ in found] == [1, 2, 3, 4]
    assert [len(row) > jsonl.MAX_LINE for _, row in found] == [False, True, False, True]


@pytest.mark.parametrize("size", [jsonl.MAX_LINE - 1, jsonl.MAX_LINE, jsonl.MAX_LINE + 1])
def test_a_line_near_the_limit_ends_at_its_line_feed(size: int) -> None:
    found = [*jsonl.iter_rows(b"1" * size + b"\n2\n")]
    assert [number for number, _ in found] == [1, 2] and found[1][1] == b"2"


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=3, max_size=20))
def test_utf_8_text_is_not_taken_for_another_encoding(text: str) -> None:
    assert detect_kind(f'{{"a": "{text}"}}'.encode()) is None
