"""Job files: the formats have the same meaning, and each problem is reported with its line."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from loramill.errors import InvalidRequest
from loramill.submission.job_file import check_entries, read_jobs

TOML = """
[defaults]
epochs = 2
rank = 8

[[jobs]]
adapter = "acme/support"
train = "acme.jsonl"
targets = ["q_proj", "v_proj"]

[[jobs]]
adapter = "bolt/sales"
train = "sub/bolt.csv"
valid = "file-123"
columns = {prompt = "q", completion = "a"}
rank = 4
metadata = {team = "b"}
"""
JSONL = """
{"defaults": {"epochs": 2, "rank": 8}}
{"adapter": "acme/support", "train": "acme.jsonl", "targets": ["q_proj", "v_proj"]}

{"adapter": "bolt/sales", "train": "sub/bolt.csv", "valid": "file-123", "columns": {"prompt": "q", "completion": "a"}, \
"rank": 4, "metadata": {"team": "b"}}
""".replace("\\\n", "")
CSV = """adapter,train,valid,columns,epochs,rank,targets,metadata
acme/support,acme.jsonl,,,2,8,"q_proj,v_proj",
bolt/sales,sub/bolt.csv,file-123,"prompt=q, completion=a",2,4,,team=b
"""
TSV = "\n".join("\t".join(cell or "" for cell in row) for row in csv.reader(CSV.splitlines())) + "\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    for name in ("acme.jsonl", "sub/bolt.csv"):
        (tmp_path / name).write_text("")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "content", "where"),
    [
        ("jobs.toml", TOML, ("line 6", "line 11")),
        ("jobs.jsonl", JSONL, ("line 3", "line 5")),
        ("jobs.csv", CSV, ("line 2", "line 3")),
        ("jobs.tsv", TSV, ("line 2", "line 3")),
        ("jobs.csv", TSV.replace("\t", ";"), ("line 2", "line 3")),
    ],
)
def test_all_formats_have_the_same_meaning(folder: Path, name: str, content: str, where: tuple[str, str]) -> None:
    (folder / name).write_text(content)
    first, second = check_entries(read_jobs(folder / name, {"seed": 3}))
    assert (first.where, second.where) == tuple(f"{name}, {line}" for line in where)
    assert (str(first.adapter), first.train, first.valid) == ("acme/support", str(folder / "acme.jsonl"), None)
    assert (second.train, second.valid) == (str(folder / "sub" / "bolt.csv"), "file-123")
    assert second.columns == {"prompt": "q", "completion": "a"}
    assert (first.options.epochs, first.options.rank, second.options.rank, first.options.seed) == (2, 8, 4, 3)
    assert first.options.targets == ("q_proj", "v_proj")
    assert (first.options.metadata, second.options.metadata) == (None, {"team": "b"})


@pytest.mark.parametrize("name", ["jobs.toml", "jobs.jsonl", "jobs.csv", "jobs.tsv"])
def test_line_separators_and_long_texts_within_a_job(folder: Path, name: str) -> None:
    note = "two\u2028lines\x85three\x0cfour" + "x" * 200_000
    quoted = json.dumps(note, ensure_ascii=False)
    content = {
        "jobs.toml": f'[[jobs]]\nadapter = "acme/a"\ntrain = "acme.jsonl"\nmetadata = {{note = {quoted}}}\n',
        "jobs.jsonl": f'{{"adapter": "acme/a", "train": "acme.jsonl", "metadata": {{"note": {quoted}}}}}\n',
        "jobs.csv": f'adapter,train,metadata\nacme/a,acme.jsonl,"note={note}"\n',
        "jobs.tsv": f"adapter\ttrain\tmetadata\nacme/a\tacme.jsonl\tnote={note}\n",
    }
    (folder / name).write_bytes(content[name].encode())
    (entry,) = check_entries(read_jobs(folder / name, {}))
    assert entry.options.metadata == {"note": note}


def test_columns_are_a_mapping_or_auto(folder: Path) -> None:
    job: dict[str, object] = {"adapter": "acme/a", "train": str(folder / "acme.jsonl")}
    (entry,) = check_entries([("job 1", {**job, "columns": "auto", "valid_columns": {"prompt": "q"}})])
    assert (entry.columns, entry.valid_columns) == ("auto", {"prompt": "q"})
    for wrong in ({"prompt": 3}, 3):
        with pytest.raises(InvalidRequest, match="job 1: valid_columns: give the column of each field"):
            check_entries([("job 1", {**job, "valid_columns": wrong})])


@pytest.mark.parametrize("name", ["jobs.toml", "jobs.jsonl"])
def test_pairs_may_be_written_as_on_the_command_line(folder: Path, name: str) -> None:
    job = {
        "adapter": "acme/a",
        "train": "acme.jsonl",
        "columns": "prompt=q, completion=a",
        "valid_columns": "auto",
        "rank_pattern": "down_proj=32",
        "metadata": "team=b,note=x=y",
    }
    pairs = "".join(f"{key} = {json.dumps(value)}\n" for key, value in job.items())
    (folder / name).write_text(f"[[jobs]]\n{pairs}" if name == "jobs.toml" else json.dumps(job))
    (entry,) = check_entries(read_jobs(folder / name, {}))
    assert (entry.columns, entry.valid_columns) == ({"prompt": "q", "completion": "a"}, "auto")
    assert entry.options.rank_pattern == {"down_proj": 32}
    assert entry.options.metadata == {"team": "b", "note": "x=y"}


def test_text_that_is_no_pairs_is_named_by_line(folder: Path) -> None:
    jobs = [{"adapter": "acme/a", "train": "acme.jsonl", name: "nonsense"} for name in ("columns", "metadata")]
    (folder / "jobs.jsonl").write_text("".join(json.dumps(job) + "\n" for job in jobs))
    with pytest.raises(InvalidRequest) as caught:
        check_entries(read_jobs(folder / "jobs.jsonl", {}))
    assert caught.value.message.splitlines()[1:] == [
        "jobs.jsonl, line 1: columns is 'nonsense'; write it as NAME=VALUE,NAME=VALUE.",
        "jobs.jsonl, line 2: metadata is 'nonsense'; write it as NAME=VALUE,NAME=VALUE.",
    ]


def test_options_of_the_command_override_defaults_but_not_a_job(folder: Path) -> None:
    (folder / "jobs.toml").write_text(TOML)
    first, second = check_entries(read_jobs(folder / "jobs.toml", {"rank": 2, "epochs": 9}))
    assert (first.options.rank, second.options.rank, second.options.epochs) == (2, 4, 9)


def test_all_problems_are_reported_with_their_line(folder: Path) -> None:
    (folder / "jobs.csv").write_text(
        "adapter,train,rank,rnak,dropout\n"
        "acme/support,acme.jsonl,8,,\n"
        "noslash,acme.jsonl,8,,\n"
        ",nowhere.jsonl,x,,\n"
        "acme/support,acme.jsonl,,3,lots\n"
    )
    with pytest.raises(InvalidRequest) as caught:
        check_entries(read_jobs(folder / "jobs.csv", {}))
    head, *problems = caught.value.message.splitlines()
    assert head == "6 problems; nothing was submitted:"
    for problem, (line, message) in zip(
        problems,
        [
            (3, "'noslash' is not an adapter name"),
            (4, "adapter is missing"),
            (4, "train: there is no file"),
            (4, "rank: Input should be a valid integer"),
            (5, "dropout: Input should be a valid number"),
            (5, "there is no option 'rnak'; did you mean 'rank'?"),
        ],
        strict=True,
    ):
        assert problem.startswith(f"jobs.csv, line {line}: ") and message in problem


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("jobs.toml", "x = ", "jobs.toml can't be read"),
        ("jobs.toml", "[wibble]", "nothing else"),
        ("jobs.toml", "jobs = 3", "nothing else"),
        ("jobs.toml", "[defaults]\nrank = 3", "contains no jobs"),
        ("jobs.jsonl", "{\n", "line 1: it is not JSON"),
        ("jobs.jsonl", "[1]\n", "line 1 is not an object"),
        ("jobs.csv", "adapter,train\na,b,c\n", "line 2 has a different number of cells"),
        ("jobs.csv", "adapter,train\na\n", "line 2 has a different number of cells"),
        ("jobs.csv", "adapter,train,metadata\na,b,c\n", "write it as NAME=VALUE"),
        ("jobs.csv", "", "contains no jobs"),
        ("jobs.csv", "adapter,train,train\na,b,c\n", "the header has the column 'train' twice"),
        ("jobs.csv", 'adapter,train\na,"b\n', "line 2 is not CSV: unexpected end of data"),
        (
            "jobs.jsonl",
            '{"adapter": "a/b", "adapter": "c/d"}',
            "line 1: an object has the key 'adapter' twice",
        ),
        ("jobs.jsonl", '{"learning_rate": NaN}', "line 1: it is not JSON: NaN"),
        ("jobs.yaml", "", "its name must end in .toml, .jsonl, .csv or .tsv"),
    ],
)
def test_an_invalid_job_file_is_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InvalidRequest) as caught:
        read_jobs(tmp_path / name, {})
    assert message in caught.value.message


def test_a_missing_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"jobs\.toml can't be read"):
        read_jobs(tmp_path / "jobs.toml", {})


def test_jobs_are_numbered_if_a_text_looks_like_a_table(tmp_path: Path) -> None:
    (tmp_path / "jobs.toml").write_text('[[jobs]]\nadapter = "a/b"\nmetadata = {x = """\n[[jobs]]\n"""}\n')
    assert [where for where, _ in read_jobs(tmp_path / "jobs.toml", {})] == ["jobs.toml, job 1"]
