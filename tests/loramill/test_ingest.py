"""Tables and data sets become JSONL; what can't is told with row and column."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramill.dataset import read_examples
from loramill.errors import DatasetInvalid, InvalidRequest, LoramillError
from loramill.ingest import read_source

ROWS = [{"prompt": "a, b\nc", "completion": "007"}, {"prompt": 'say "NA"', "completion": "null"}]
CHATS = [
    [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho", "weight": 1.0}],
    [{"role": "system", "content": ""}, {"role": "user", "content": "é"}, {"role": "assistant", "content": "ü"}],
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """The rows in the form that the file's name says."""
    match path.suffix:
        case ".csv":
            with path.open("w", newline="") as file:
                table = csv.DictWriter(file, rows[0])
                table.writeheader()
                table.writerows(rows)
        case ".parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
        case ".json":
            path.write_text(json.dumps(rows))
        case ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def lines(content: bytes) -> list[Any]:
    return [json.loads(line) for line in content.splitlines()]


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".json", ".jsonl"])
def test_every_form_says_the_same(tmp_path: Path, suffix: str) -> None:
    name, content = read_source(write(tmp_path / f"x{suffix}", ROWS))
    assert name == f"x{suffix}" and lines(content) == ROWS


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".json"])
def test_columns_are_chosen(tmp_path: Path, suffix: str) -> None:
    rows = [{"id": i, "question": row["prompt"], "answer": row["completion"]} for i, row in enumerate(ROWS)]
    path = write(tmp_path / f"x{suffix}", rows)
    assert lines(read_source(path, {"prompt": "question", "completion": "answer"})[1]) == ROWS
    with pytest.raises(DatasetInvalid, match="id, question, answer"):
        read_source(path)
    with pytest.raises(DatasetInvalid, match="no column nose; it has id, question, answer"):
        read_source(path, {"prompt": "nose", "completion": "answer"})
    for odd in ({"prompt": "question"}, {"wibble": "question"}, {"messages": "question", "prompt": "answer"}):
        with pytest.raises(InvalidRequest) as caught:
            read_source(path, odd)
        assert caught.value.param == "columns"


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".json"])
def test_conversations(tmp_path: Path, suffix: str) -> None:
    rows = [{"chat": json.dumps(chat) if suffix == ".csv" else chat, "n": 1} for chat in CHATS]
    content = read_source(write(tmp_path / f"x{suffix}", rows), {"messages": "chat"})[1]
    assert lines(content) == [{"messages": chat} for chat in CHATS]
    assert len(read_examples(content, "x").examples) == 2


def test_weights_of_completions(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", [{**ROWS[0], "weight": "0.5"}])
    assert lines(read_source(path)[1]) == [{**ROWS[0], "weight": 0.5}]
    with pytest.raises(DatasetInvalid, match="row 1, column weight: it is 'much'"):
        read_source(write(tmp_path / "x.csv", [{**ROWS[0], "weight": "much"}]))


def test_a_hub_id_names_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a folder here, which `datasets` reads by the same name, so that nothing is asked of a hub."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    write(tmp_path / "org" / "name" / "train.jsonl", ROWS)
    write(tmp_path / "org" / "name" / "test.jsonl", ROWS[:1])
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    assert lines(read_source("hf:org/name")[1]) == ROWS
    assert lines(read_source("hf:org/name:test")[1]) == ROWS[:1]
    with pytest.raises(InvalidRequest, match="hf:org/name:nose can't be read"):
        read_source("hf:org/name:nose")
    with pytest.raises(InvalidRequest, match="write hf:org/name"):
        read_source("hf:a b")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("x.csv", b"", "is empty"),
        ("x.csv", b"prompt,completion\na,\n", "x.csv, row 1, column completion: it is empty"),
        ("x.csv", b"prompt,completion\na,b\nc\n", "x.csv, row 2: it has 1 cells where the header has 2"),
        ("x.csv", b"prompt,completion\na,b,c\n", "x.csv, row 1: it has 3 cells where the header has 2"),
        ("x.csv", b"prompt,prompt\na,b\n", "twice"),
        ("x.csv", b'prompt,completion\na,"b\n', "it is not CSV"),
        ("x.csv", b"prompt,completion\n\xff,b\n", "byte 19 is not UTF-8"),
        ("x.csv", b"messages\n[1\n", "x.csv, row 1, column messages: it is not JSON"),
        ("x.csv", b"messages\n3\n", "x.csv, row 1, column messages: it is 3; it must be a list"),
        ("x.json", b'[{"prompt": 1, "completion": "b"}]', "x.json, row 1, column prompt: it is 1; it must be text"),
        ("x.json", b'[{"prompt": null, "completion": "b"}]', "x.json, row 1, column prompt: it is empty"),
        ("x.json", b'{"prompt"', "x.json can't be read as a table"),
        ("x.parquet", b"PAR1", "x.parquet can't be read as a table"),
    ],
)
def test_defects_are_named(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DatasetInvalid) as caught:
        read_source(tmp_path / name)
    assert says in caught.value.message


def test_many_problems_are_counted(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "" if i % 2 else "b"} for i in range(60)]
    with pytest.raises(DatasetInvalid) as caught:
        read_source(write(tmp_path / "x.csv", rows))
    assert caught.value.message.startswith("x.csv has 30 problems; the first 20:")
    assert caught.value.problems[1] == "x.csv, row 4, column completion: it is empty; fill it in, or remove the row."
    assert len(caught.value.problems) == 20


@pytest.mark.parametrize("name", ["x.csv", "x.parquet", "x.json", "x.jsonl", ".", "x"])
def test_a_file_that_is_not_there(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidRequest, match="can't be read"):
        read_source(tmp_path / name)


def test_jsonl_has_no_columns(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="columns"):
        read_source(write(tmp_path / "x.jsonl", ROWS), {"prompt": "a"})


text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


@given(st.lists(st.tuples(text, text), min_size=1))
def test_a_csv_loses_nothing(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]]) -> None:
    table = io.StringIO(newline="")
    csv.writer(table, quoting=csv.QUOTE_ALL).writerows([("prompt", "completion"), *rows])
    path = tmp_path_factory.mktemp("csv") / "x.csv"
    path.write_bytes(table.getvalue().encode())
    try:
        read = lines(read_source(path)[1])
    except LoramillError as error:
        raise AssertionError(rows) from error
    assert [(line["prompt"], line["completion"]) for line in read] == rows


def test_jsonl_and_csv_need_no_datasets(tmp_path: Path) -> None:
    for suffix in (".jsonl", ".csv"):
        path = write(tmp_path / f"x{suffix}", ROWS)
        script = f"import sys; from loramill.ingest import read_source; read_source({str(path)!r}); " + (
            "print(*{'datasets', 'pandas', 'pyarrow'} & {*sys.modules})"
        )
        ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        assert ran.stdout.split() == []
