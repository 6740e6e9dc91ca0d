"""Every format becomes JSONL by the same rules; problems are named with row and column."""

from __future__ import annotations

import bz2
import contextlib
import csv
import datetime
import decimal
import gzip
import io
import json
import lzma
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

from loramill.data.examples import read_examples
from loramill.data.ingest import PreparedSource, read_source
from loramill.errors import DatasetInvalid, InvalidRequest, LoramillError

ROWS = [{"prompt": "a, b\nc", "completion": "007"}, {"prompt": 'say "NA"', "completion": "null"}]
CHATS = [
    [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho", "weight": 1.0}],
    [{"role": "system", "content": ""}, {"role": "user", "content": "é"}, {"role": "assistant", "content": "ü"}],
]
#: Every format that rows are written in.
FORMATS = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".arrow", ".csv.gz", ".jsonl.zst", ".jsonl.xz", ".json.bz2")


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Writes the rows in the format of the file's extension."""
    kind, *packed = "".join(path.suffixes).strip(".").split(".")
    match kind:
        case "csv" | "tsv":
            table = io.StringIO(newline="")
            cells = [
                {key: cell if isinstance(cell, str) else json.dumps(cell) for key, cell in r.items()} for r in rows
            ]
            writer = csv.DictWriter(table, [*rows[0]], delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows(cells)
            content = table.getvalue().encode()
        case "parquet" | "arrow":
            sink = io.BytesIO()
            if kind == "parquet":
                pq.write_table(pa.Table.from_pylist(rows), sink)
            else:
                with pa.ipc.new_file(sink, (made := pa.Table.from_pylist(rows)).schema) as file:
                    file.write(made)
            content = sink.getvalue()
        case "json":
            content = json.dumps(rows, indent=1).encode()
        case "jsonl":
            content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    pack = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstd}
    path.write_bytes(pack[packed[0]](content) if packed else content)
    return path


def zstd(content: bytes) -> bytes:
    packed: bytes = pa.compress(content, "zstd", asbytes=True)
    return packed


def lines(prepared: PreparedSource) -> list[Any]:
    return [json.loads(line) for line in prepared.content.split(b"\n") if line]


def refused(path: Path, columns: Any = None) -> str:
    with pytest.raises(InvalidRequest) as caught:
        read_source(path, columns)
    return caught.value.message


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_format_gives_the_same_lines(tmp_path: Path, suffix: str) -> None:
    found = read_source(write(tmp_path / f"x{suffix}", ROWS))
    assert (found.name, lines(found), found.warnings) == (f"x{suffix}", ROWS, ())
    assert found.format.endswith("prompt and completion (prompt, completion)")


@pytest.mark.parametrize("suffix", FORMATS)
def test_columns_are_chosen_and_others_left_out_with_a_warning(tmp_path: Path, suffix: str) -> None:
    rows = [{"id": str(i), "question": row["prompt"], "answer": row["completion"]} for i, row in enumerate(ROWS)]
    path = write(tmp_path / f"x{suffix}", rows)
    found = read_source(path, {"prompt": "question", "completion": "answer"})
    assert (lines(found), found.warnings) == (ROWS, (f"x{suffix}: unused columns: id.",))
    assert found.format.endswith("prompt and completion (prompt=question, completion=answer)")
    assert f"x{suffix} has the columns id, question, answer, which match no known format" in refused(path, "auto")
    assert "no column nose; it has id, question, answer" in refused(path, {"prompt": "nose", "completion": "answer"})
    for odd in ({"prompt": "question"}, {"wibble": "question"}, {"messages": "question", "prompt": "answer"}):
        with pytest.raises(InvalidRequest) as caught:
            read_source(path, odd)
        assert caught.value.param == "columns"


@pytest.mark.parametrize("suffix", FORMATS)
def test_extra_columns_are_left_out_with_a_warning(tmp_path: Path, suffix: str) -> None:
    for rows in ([{"messages": chat, "id": "x"} for chat in CHATS], [{**row, "id": "x"} for row in ROWS]):
        found = read_source(write(tmp_path / f"x{suffix}", rows))
        assert found.warnings == (f"x{suffix}: unused columns: id.",)
        assert lines(found) == [{key: cell for key, cell in row.items() if key != "id"} for row in rows]
        assert len(read_examples(found.content, "x").examples) == 2


@pytest.mark.parametrize("suffix", FORMATS)
def test_conversations_in_a_column_of_another_name(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"x{suffix}", [{"chat": chat, "n": "1"} for chat in CHATS])
    found = read_source(path, {"messages": "chat"})
    assert lines(found) == [{"messages": chat} for chat in CHATS]
    assert len(read_examples(found.content, "x").examples) == 2


def test_jsonl_that_needs_no_change_stays_byte_for_byte(tmp_path: Path) -> None:
    raw = b'\xef\xbb\xbf{"prompt":"a",  "completion":"b"}\r\n\n{"completion":"\\u0064","prompt":"c"}'
    (tmp_path / "x.jsonl").write_bytes(raw)
    assert read_source(tmp_path / "x.jsonl").content == raw


def test_a_line_keeps_its_number(tmp_path: Path) -> None:
    """Line numbers in the gateway's messages are then those of the file."""
    (tmp_path / "x.jsonl").write_text(
        '\n\n{"prompt": "a", "completion": "b", "id": 1}\n\n{"prompt": "c", "completion": "d"}'
    )
    numbers = [example.line for example in read_examples(read_source(tmp_path / "x.jsonl").content, "x").examples]
    assert numbers == [3, 5]


def test_completions_may_have_weights(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", [{**ROWS[0], "weight": "0.5"}])
    assert lines(read_source(path)) == [{**ROWS[0], "weight": 0.5}]
    with pytest.raises(DatasetInvalid, match="row 1, column weight: it is 'much'"):
        read_source(write(tmp_path / "x.csv", [{**ROWS[0], "weight": "much"}]))


def test_a_hub_id_names_a_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A local folder, which `datasets` reads by the same name, stands in for the hub."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    write(tmp_path / "org" / "name" / "train.jsonl", ROWS)
    write(tmp_path / "org" / "name" / "test.jsonl", ROWS[:1])
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    assert lines(read_source("hf:org/name")) == ROWS
    assert lines(read_source("hf:org/name:test")) == ROWS[:1]
    with pytest.raises(InvalidRequest, match="hf:org/name:nose can't be read"):
        read_source("hf:org/name:nose")
    with pytest.raises(InvalidRequest, match="write hf:org/name"):
        read_source("hf:a b")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", b"", "is empty"),
        ("x.csv", b"prompt,completion\na,\n", "x.csv, row 1, column completion: it is empty"),
        ("x.csv", b"prompt,completion\na,b\nc\n", "x.csv, row 2: it has 1 cells where the header has 2"),
        ("x.csv", b"prompt,completion\na,b,c\n", "x.csv, row 1: it has 3 cells where the header has 2"),
        ("x.csv", b"prompt,prompt\na,b\n", "x.csv: the header has the column 'prompt' twice; rename one"),
        ("x.csv", b'prompt,completion\na,"b\n', "it is not CSV"),
        ("x.csv", b"prompt,completion\n\xff,b\n", "byte 19 is not UTF-8"),
        ("x.csv", b"messages\n[1\n", "x.csv, row 1, column messages: it is not JSON"),
        ("x.csv", b"messages\n3\n", "x.csv, row 1, column messages: it is 3; it must be a list"),
        ("x.json", b'[{"prompt": 1, "completion": "b"}]', "x.json, row 1, column prompt: it is 1; it must be text"),
        ("x.json", b'[{"prompt": null, "completion": "b"}]', "x.json, row 1, column prompt: it is empty"),
        ("x.json", b'{"prompt"', "x.json, line 1: it is not JSON"),
        (
            "x.json",
            b'[{"prompt": "a", "completion": "b"}, {"a": 1, "a": 2}]',
            "x.json, row 2: an object has the key 'a' twice",
        ),
        (
            "x.json",
            b'[{"prompt": "a", "completion": "b"}\n, {"a": NaN}]',
            "x.json, row 2: it is not JSON: NaN is not a number",
        ),
        (
            "x.json",
            b'[{"prompt": "a",\n "completion": b}]',
            "x.json, row 1: it is not JSON: Expecting value at line 2, c",
        ),
        ("x.json", b'[{"prompt": "a", "completion": "b"}', "x.json: it is not JSON: ',' or ']' is missing"),
        ("x.json", b"[]", "x.json is empty"),
        ("x.json", b"[1]", "x.json, row 1: it is 1, not an object"),
        (
            "x.json",
            b'{\n"version": 1,\n"data": []\n}',
            "x.json has the columns version, data, which match no known format",
        ),
        ("x.jsonl", b'{"prompt": "a", "completion": "b"}\n{"prompt": "a"}', "line 2, column completion: it is missing"),
        ("x.jsonl", b'{"prompt": "\\ud800", "completion": "b"}', "x.jsonl, line 1: prompt contains a lone surrogate"),
        ("x.jsonl", b"\n", "x.jsonl is empty"),
        ("x.jsonl", b"prompt,completion\na,b\n", "x.jsonl, line 1: it is not JSON"),
        (
            "x.jsonl",
            b'{"messages": []}\n{"messages": 3}',
            "x.jsonl, line 2, column messages: it is 3; it must be a list",
        ),
        (
            "x.jsonl",
            b'{"text": "a"}',
            "x.jsonl has the columns text, which match no known format (messages; prompt and comp",
        ),
        ("x.jsonl", b'{"messages": [], "chosen": [], "rejected": []}', "select columns, such as messages=messages or"),
        ("x.jsonl", b'{"messages": [], "prompt": "", "completion": ""}', "can be read as messages and as prompt and"),
        ("x.txt", b"prompt,completion\na,b\n", "is not in a known format"),
        ("x.parquet", b"PAR1", "x.parquet can't be read as a table"),
        ("x.parquet", b"{}", "x.parquet can't be read as a table: its content does not match the suffix of its name"),
        (
            "x.csv.gz",
            gzip.compress(b"prompt,completion\n" * 99, mtime=0)[:-9],
            "x.csv.gz is compressed by gzip, and damaged",
        ),
        ("x.jsonl.zst", zstd(b"{}" * 999)[:-9], "x.jsonl.zst is compressed by zstd, and damaged"),
        ("x.xlsx", b"PK\x03\x04...", "x.xlsx is a ZIP archive (an .xlsx workbook is one); save it as CSV"),
        ("x.pkl", b"\x80\x05\x95", "x.pkl is a Python pickle"),
        ("x.jsonl", b"caf\xe9", "byte 4 is not UTF-8 (in Windows-1252 it is '\u00e9'); save the file as UTF-8"),
        ("x.csv", b"prompt,completion\ncaf\xe9,b", "byte 22 is not UTF-8 (in Windows-1252 it is '\u00e9')"),
        ("x.csv", b"\xff\xfea", "x.csv begins like UTF-16 but is not"),
        ("x.csv", b",prompt,completion\n0,a,b", "x.csv: column 1 of the header has no name; give it one (pandas"),
        ("x.csv", b"prompt;completion\na;b;c", "row 1: it has 3 cells where the header has 2 (separated by ';'); put"),
        ("x.tsv", b"prompt\tcompletion\na,b", "row 1: it has 1 cells where the header has 2 (separated by tabs)"),
        ("x.csv", b'prompt|completion\n"a"b|c', "line 2: it is not CSV separated by '|'"),
    ],
)
def test_defects_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DatasetInvalid) as caught:
        read_source(tmp_path / name)
    assert message in caught.value.message


def test_many_problems_are_counted(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "" if i % 2 else "b"} for i in range(60)]
    with pytest.raises(DatasetInvalid) as caught:
        read_source(write(tmp_path / "x.csv", rows))
    assert caught.value.message.startswith("x.csv has 30 problems; the first 20:")
    assert caught.value.problems[1] == "x.csv, row 4, column completion: it is empty; fill it in, or remove the row."
    assert len(caught.value.problems) == 20


@pytest.mark.parametrize("name", ["x.csv", "x.parquet", "x.json", "x.jsonl", ".", "x"])
def test_a_missing_file_is_reported(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidRequest, match="can't be read"):
        read_source(tmp_path / name)


# CSV


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_the_separator_is_found(tmp_path: Path, separator: str, suffix: str) -> None:
    """Even if the texts contain other separators, whose counts may agree."""
    path = tmp_path / f"x{suffix}"
    rows = [{"prompt": "one, two; three | four\tfive", "completion": "six, seven; eight | nine\tten"}] * 3
    for quoting, end in ((csv.QUOTE_ALL, "\r\n"), (csv.QUOTE_MINIMAL, "\n")):
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            table = csv.DictWriter(file, [*rows[0]], delimiter=separator, quoting=quoting, lineterminator=end)
            table.writeheader()
            table.writerows(rows)
            file.write(end * 2)
        assert lines(read_source(path)) == rows


def test_rows_decide_between_two_separators_of_a_header(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("id, or none;prompt;completion\n1;a, b, c;d\n2;e;f\n")
    assert lines(read_source(tmp_path / "x.csv")) == [
        {"prompt": "a, b, c", "completion": "d"},
        {"prompt": "e", "completion": "f"},
    ]


def test_a_cell_may_be_long_and_contain_any_line_end(tmp_path: Path) -> None:
    rows = [{"prompt": "x" * 200_000, "completion": "a\nb\r\nc\u2028d\x85e\x0bf\x0cg"}]
    assert lines(read_source(write(tmp_path / "x.csv", rows))) == rows


def test_one_column_is_enough(tmp_path: Path) -> None:
    assert lines(read_source(write(tmp_path / "x.csv", [{"messages": CHATS[0]}]))) == [{"messages": CHATS[0]}]


def test_utf_16_is_recognized_by_its_byte_order_mark(tmp_path: Path) -> None:
    """Spreadsheets save "Unicode text" this way; it is written as UTF-8."""
    for name, content in (("x.tsv", "prompt\tcompletion\nä\tö\n"), ("x.jsonl", '{"prompt": "ä", "completion": "ö"}')):
        (tmp_path / name).write_text(content, encoding="utf-16")
        assert lines(read_source(tmp_path / name)) == [{"prompt": "ä", "completion": "ö"}]


# Values that JSON has no type for


@pytest.mark.parametrize("name", ["x.json", "x.jsonl"])
@pytest.mark.parametrize("date", ["2024-03-01", "2024-03-01T10:00:00", "2024-03-01T10:00:00Z", "10:00:00"])
def test_texts_that_look_like_dates_stay_texts(tmp_path: Path, name: str, date: str) -> None:
    for rows in (
        [{"prompt": f"Date of order {i}?", "completion": date} for i in range(3)],
        [{"messages": [{"role": "user", "content": date}, {"role": "assistant", "content": date}]}] * 3,
    ):
        for content in (json.dumps(rows), "\n".join(map(json.dumps, rows))):
            (tmp_path / name).write_text(content)
            assert lines(read_source(tmp_path / name)) == rows


def test_large_integers_stay_exact(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('[{"messages": [{"role": "user", "content": "a", "seen": 12345678901234567890123}]}]')
    assert lines(read_source(path))[0]["messages"][0]["seen"] == 12345678901234567890123


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (b"a", "row 2, column prompt: it is bytes (binary); cast the column to text."),
        (decimal.Decimal("1.5"), "row 2, column prompt: it is a decimal; cast the column to text."),
        (datetime.timedelta(1), "row 2, column prompt: it is a span of time; cast the column to text."),
        (["a"], "row 2, column prompt: it is ['a']; it must be text."),
        ({"a": b"b"}, "row 2, column prompt: it[a] is bytes (binary)"),
        (7, "row 2, column prompt: it is 7; it must be text."),
        (float("inf"), "row 2, column prompt: it is the number inf."),
        (True, "row 2, column prompt: it is True; it must be text."),
    ],
)
@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_a_cell_that_is_not_text_is_named(tmp_path: Path, suffix: str, cell: Any, message: str) -> None:
    path = write(tmp_path / f"x{suffix}", [{"prompt": None, "completion": "b"}, {"prompt": cell, "completion": "b"}])
    assert message in refused(path)


def test_dates_of_a_table_become_text_with_a_warning(tmp_path: Path) -> None:
    rows = [{"prompt": "When?", "completion": datetime.date(2024, 3, 1), "at": datetime.time(1)}]
    found = read_source(write(tmp_path / "x.parquet", rows))
    assert lines(found) == [{"prompt": "When?", "completion": "2024-03-01"}]
    assert found.warnings == (
        "x.parquet: unused columns: at.",
        "x.parquet: completion holds dates, which became text such as 2024-03-01T00:00:00.",
    )
    when = datetime.datetime(2024, 3, 1, 9, 30, tzinfo=datetime.UTC)
    turns = [[{"role": "user", "content": "When?"}, {"role": "assistant", "content": "-", "at": when}]]
    found = read_source(write(tmp_path / "x.arrow", [{"messages": turns[0]}]))
    assert lines(found)[0]["messages"][1]["at"] == "2024-03-01T09:30:00+00:00" and len(found.warnings) == 1


def test_two_columns_with_the_same_name(tmp_path: Path) -> None:
    table = pa.table([pa.array(["a"]), pa.array(["b"])], names=["prompt", "prompt"])
    pq.write_table(table, tmp_path / "x.parquet")
    assert "two columns have the same name" in refused(tmp_path / "x.parquet")


# Wrong extensions, and folders


def test_the_content_decides_rather_than_the_extension(tmp_path: Path) -> None:
    for right, wrong in ((".parquet", ".jsonl"), (".json", ".jsonl"), (".jsonl", ".json"), (".csv.gz", ".csv")):
        content = write(tmp_path / f"x{right}", ROWS).read_bytes()
        (tmp_path / f"y{wrong}").write_bytes(content)
        assert lines(read_source(tmp_path / f"y{wrong}")) == ROWS


def test_folders_that_datasets_saved(tmp_path: Path) -> None:
    one = datasets.Dataset.from_list(ROWS)
    one.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict(train=one, test=one).save_to_disk(str(tmp_path / "more"))
    assert lines(read_source(tmp_path / "one")) == ROWS
    assert lines(read_source(tmp_path / "more" / "test")) == ROWS
    assert f"has the splits test, train: give one of them, such as {tmp_path / 'more' / 'test'}" in refused(
        tmp_path / "more"
    )
    assert "it is a folder that was not written by" in refused(tmp_path)
    (tmp_path / "one" / "state.json").write_text("{}")
    assert "one can't be read as a table" in refused(tmp_path / "one")


# Any text


text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


@pytest.mark.parametrize("suffix", FORMATS)
@given(rows=st.lists(st.fixed_dictionaries({"prompt": text, "completion": text}), min_size=1, max_size=5))
def test_no_format_loses_anything(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, rows: list[dict[str, str]]
) -> None:
    path = write(tmp_path_factory.mktemp("any") / f"x{suffix}", rows)
    try:
        assert lines(read_source(path)) == rows
    except LoramillError as error:
        raise AssertionError(rows) from error


@given(st.binary(max_size=200), st.sampled_from(["", ".csv", ".tsv", ".json", ".jsonl", ".parquet", ".csv.gz"]))
def test_any_bytes_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes, suffix: str) -> None:
    path = tmp_path_factory.mktemp("any") / f"x{suffix}"
    path.write_bytes(content)
    with contextlib.suppress(LoramillError):
        read_source(path)


def test_jsonl_and_csv_do_not_import_datasets(tmp_path: Path) -> None:
    for suffix in (".jsonl", ".csv"):
        path = write(tmp_path / f"x{suffix}", ROWS)
        script = f"import sys; from loramill.data.ingest import read_source; read_source({str(path)!r}); " + (
            "print(*{'datasets', 'pandas', 'pyarrow'} & {*sys.modules})"
        )
        ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        assert ran.stdout.split() == []


def test_metadata_of_a_row_is_kept(tmp_path: Path) -> None:
    """Of other datasets, whose metadata may be nested, texts, numbers and booleans are kept."""
    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    rows = [
        {"messages": messages, "metadata": {"topic": "tax", "nested": {"a": 1}, "year": 2026}},
        {"messages": messages, "metadata": "of another form"},
        {"messages": messages},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [json.loads(line) for line in read_source(file).content.splitlines()]
    assert [line.get("metadata") for line in lines] == [{"topic": "tax", "year": 2026}, None, None]
