"""Known formats of training data are recognized and converted to OpenAI's messages without losing a field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from loramill.data.ingest import PreparedSource, read_source
from loramill.errors import DatasetInvalid


def read(tmp_path: Path, *rows: object, columns: Any = None) -> PreparedSource:
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_source(tmp_path / "x.jsonl", columns)


def line(prepared: PreparedSource) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(prepared.content)
    return found


def turn(role: str, content: str, **more: object) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


TOOL = {"name": "weather", "description": "Now.", "parameters": {"type": "object", "properties": {}}}
WRAPPED = {"type": "function", "function": TOOL}


def call(number: str, name: str, arguments: str) -> dict[str, Any]:
    return {"id": f"call_{number}", "type": "function", "function": {"name": name, "arguments": arguments}}


@pytest.mark.parametrize(
    ("row", "recognized", "messages"),
    [
        (
            {"instruction": "Add.", "input": "1 and 2", "output": "3"},
            "JSONL, Alpaca (instruction, output)",
            [turn("user", "Add.\n1 and 2"), turn("assistant", "3")],
        ),
        (
            {
                "instruction": "And now?",
                "input": "",
                "output": "No.",
                "system": "Be brief.",
                "history": [["Hi", "Hello"], ["Open?", "Yes."]],
            },
            "JSONL, Alpaca (instruction, output)",
            [
                turn("system", "Be brief."),
                turn("user", "Hi"),
                turn("assistant", "Hello"),
                turn("user", "Open?"),
                turn("assistant", "Yes."),
                turn("user", "And now?"),
                turn("assistant", "No."),
            ],
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "Hi"},
                    {"from": "gpt", "value": "Hello", "weight": 0},
                    {"from": "User", "value": "Open?"},
                    {"from": "assistant", "value": "Yes."},
                ],
                "system": "Be brief.",
            },
            "JSONL, ShareGPT (conversations)",
            [
                turn("system", "Be brief."),
                turn("user", "Hi"),
                turn("assistant", "Hello", weight=0),
                turn("user", "Open?"),
                turn("assistant", "Yes."),
            ],
        ),
        (
            {"conversations": [{"from": "system", "value": "Be brief."}, turn("user", "Hi"), turn("assistant", "Ho")]},
            "JSONL, ShareGPT (conversations)",
            [turn("system", "Be brief."), turn("user", "Hi"), turn("assistant", "Ho")],
        ),
        (
            {"messages": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
            "JSONL, messages",
            [turn("user", "Hi"), turn("assistant", "Hello")],
        ),
        (
            {
                "prompt": [turn("user", "Hi"), turn("assistant", "Hello"), turn("user", "Open?")],
                "completion": [turn("assistant", "Yes.")],
            },
            "JSONL, prompt and completion (prompt, completion)",
            [
                turn("user", "Hi"),
                turn("assistant", "Hello", weight=0),
                turn("user", "Open?"),
                turn("assistant", "Yes."),
            ],
        ),
    ],
)
def test_a_format_is_recognized(tmp_path: Path, row: object, recognized: str, messages: object) -> None:
    for columns in (None, "auto"):
        found = read(tmp_path, row, columns=columns)
        assert (found.format, found.warnings, line(found)) == (recognized, (), {"messages": messages})


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL]), [WRAPPED]])
def test_tool_calls_in_sharegpt(tmp_path: Path, tools: object) -> None:
    conversation = [
        {"from": "human", "value": "Rome or Oslo?"},
        {
            "from": "function_call",
            "value": '[{"name": "weather", "arguments": {"city": "Rome"}}, {"name": "weather", "arguments": "{}"}]',
        },
        {"from": "observation", "value": "sun"},
        {"from": "tool", "value": "rain"},
        {"from": "gpt", "value": "Rome."},
    ]
    calls = [call("1_0", "weather", '{"city": "Rome"}'), call("1_1", "weather", "{}")]
    assert line(read(tmp_path, {"conversations": conversation, "tools": tools})) == {
        "messages": [
            turn("user", "Rome or Oslo?"),
            {"role": "assistant", "content": None, "tool_calls": calls},
            turn("tool", "sun", tool_call_id="call_1_0"),
            turn("tool", "rain", tool_call_id="call_1_1"),
            turn("assistant", "Rome."),
        ],
        "tools": [WRAPPED],
    }


def test_columns_may_have_other_names(tmp_path: Path) -> None:
    row = {"q": "Add.", "context": "1 and 2", "a": "3", "id": 5}
    found = read(tmp_path, row, columns={"instruction": "q", "input": "context", "output": "a"})
    assert line(found) == {"messages": [turn("user", "Add.\n1 and 2"), turn("assistant", "3")]}
    assert found.format == "JSONL, Alpaca (instruction=q, input=context, output=a)"
    assert found.warnings == ("x.jsonl: unused columns: id.",)


def test_a_later_row_may_have_a_field_that_the_first_lacks(tmp_path: Path) -> None:
    first, second = {"instruction": "a", "output": "b"}, {"instruction": "a", "output": "b", "input": "c", "id": 1}
    found = read(tmp_path, first, second)
    assert [json.loads(row)["messages"][0]["content"] for row in found.content.splitlines()] == ["a", "a\nc"]
    found = read(tmp_path, first, second, columns={"instruction": "instruction", "output": "output", "input": "input"})
    assert [json.loads(row)["messages"][0]["content"] for row in found.content.splitlines()] == ["a", "a\nc"]


def test_messages_keep_their_tools(tmp_path: Path) -> None:
    row = {"messages": [turn("user", "a"), turn("assistant", "b")], "tools": [WRAPPED], "parallel_tool_calls": False}
    assert line(read(tmp_path, row)) == row
    assert line(read(tmp_path, {**row, "tools": json.dumps([WRAPPED])})) == row


def test_nulls_that_arrow_adds_are_removed(tmp_path: Path) -> None:
    """Arrow adds each key to every message; the null content of a call is intended."""
    messages = [
        turn("user", "a"),
        {"role": "assistant", "content": None, "tool_calls": [call("1", "weather", "{}")]},
        turn("tool", "c", tool_call_id="call_1"),
        turn("assistant", "d", weight=2.0),
    ]
    pq.write_table(pa.Table.from_pylist([{"messages": messages, "tools": None}]), tmp_path / "x.parquet")
    assert line(read_source(tmp_path / "x.parquet")) == {"messages": messages}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"conversations": [{"from": "elf", "value": "a"}]},
            "conversations: conversations[0].from is 'elf'; it must be",
        ),
        ({"conversations": [{"from": "human", "value": 3}]}, "conversations[0].value is 3; it must be text"),
        ({"conversations": ["a"]}, "conversations[0] is 'a'; it must be an object with 'from' and 'value'"),
        ({"conversations": "a"}, "column conversations: it is not JSON: .*; write a list of turns"),
        ({"conversations": []}, None),
        ({"conversations": [{"from": "tool", "value": "a"}]}, "no function_call turn before it needs a result"),
        ({"conversations": [{"from": "function_call", "value": "a"}]}, "conversations[0].value: it is not JSON"),
        (
            {"conversations": [{"from": "function_call", "value": "[1]"}]},
            "conversations[0].value is 1; it must be a call",
        ),
        (
            {"instruction": "a", "output": "b", "history": [["c"]]},
            "history: entry 1 is ['c']; it must be a pair of texts",
        ),
        ({"instruction": "a", "output": 3}, "column output: it is 3; it must be text"),
        ({"instruction": "", "output": "b"}, "column instruction: it is empty"),
        (
            {"prompt": [turn("user", "a")], "completion": "b"},
            "completion: it is 'b'; it must be a list of messages, as",
        ),
        ({"prompt": "a", "completion": "b", "tools": [TOOL]}, "column tools: tools belong to messages"),
        ({"prompt": "a", "completion": "b", "weight": "nan"}, "column weight: it is 'nan'; it must be a number"),
        (
            {"question": "a", "answer": "b"},
            "x.jsonl has the columns question, answer, which match no known format",
        ),
        ({"instruction": "a", "output": "b", "conversations": []}, "can be read as Alpaca and as ShareGPT"),
    ],
)
def test_invalid_rows_are_reported(tmp_path: Path, row: object, message: str | None) -> None:
    if message is None:  # the gateway validates messages
        assert line(read(tmp_path, row)) == {"messages": []}
        return
    with pytest.raises(DatasetInvalid) as caught:
        read(tmp_path, row)
    assert all(part in caught.value.message for part in message.split(".*"))


def test_columns_of_another_file_are_used_only_if_they_exist(tmp_path: Path) -> None:
    """The columns may be those of a training file; a validation file in another format is still recognized."""
    columns = {"prompt": "question", "completion": "answer"}
    (tmp_path / "x.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    assert line(read_source(tmp_path / "x.jsonl", columns, columns_optional=True)) == {"prompt": "a", "completion": "b"}
    (tmp_path / "x.csv").write_text("question,answer\na,b\n")
    assert line(read_source(tmp_path / "x.csv", columns, columns_optional=True)) == {"prompt": "a", "completion": "b"}
    with pytest.raises(DatasetInvalid, match="no column question, answer"):
        read_source(tmp_path / "x.jsonl", columns)
