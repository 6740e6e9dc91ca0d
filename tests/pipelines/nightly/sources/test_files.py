"""Scans of folders: each file becomes new data exactly once."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import fsspec
import pytest

from loramill.errors import DiskFull
from loramill.names import AdapterName
from loramill.pipelines.nightly.definition import NightlyDefinition
from loramill.pipelines.nightly.sources import files
from loramill.pipelines.nightly.sources.files import scan_sources
from loramill.pipelines.nightly.sources.pattern import names_in, owners
from loramill.pipelines.nightly.sources.policy import FileAction, decide
from loramill.registry import Registry, datasets, deletion, nightly, sources, tenants
from loramill.types import SourceFileRecord, SourceScan

from ....databases import create_sqlite_database

NOW = 1_000_000.0


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    create_sqlite_database(url := f"sqlite:///{tmp_path / 'loramill.db'}")
    registry = Registry.open(url, (tmp_path / "artifacts").as_uri())
    with registry.writing() as session:
        for tenant in ("acme", "bolt"):
            tenants.create(session, tenant)
    return registry


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "data"


def definition(*urls: str | Path, **changes: object) -> NightlyDefinition:
    return NightlyDefinition.model_validate({"sources": [{"url": str(url)} for url in urls]} | changes)


def lines(*questions: str) -> str:
    return "".join(json.dumps({"prompt": question, "completion": "yes"}) + "\n" for question in questions)


def write(path: Path, text: str, age: float = 60) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    os.utime(path, (NOW - age, NOW - age))
    return path


def new_files(registry: Registry) -> dict[str, list[str]]:
    with registry.reading() as session:
        return {
            each.adapter: [datasets.get(session, file).filename for file in each.train]
            for each in nightly.pending_data(session)
        }


def test_each_file_becomes_new_data_of_its_adapter_once(registry: Registry, folder: Path) -> None:
    found = definition(folder / "{tenant}" / "{adapter}" / "*.jsonl")
    write(folder / "acme" / "support" / "monday.jsonl", lines("a"))
    write(folder / "bolt" / "sales" / "monday.jsonl", lines("b", "c"))
    write(folder / "bolt" / ".cache" / "monday.jsonl", lines("d"))
    assert scan_sources(registry, found, now=NOW).added == 2
    assert new_files(registry) == {"acme/support": ["monday.jsonl"], "bolt/sales": ["monday.jsonl"]}
    again = scan_sources(registry, found, now=NOW + 60)
    assert (again.added, again.waiting, again.problems) == (0, (), ())
    write(folder / "acme" / "support" / "monday.jsonl", lines("a", "e"), age=30)
    write(folder / "acme" / "support" / "copy.jsonl", lines("a"))  # the same content under another name
    write(folder / "bolt" / "sales" / "monday.jsonl", lines("b", "c"), age=30)  # touched
    assert scan_sources(registry, found, now=NOW).added == 1
    assert new_files(registry)["acme/support"] == ["monday.jsonl", "monday.jsonl"]


def test_a_file_that_may_still_be_written_waits(registry: Registry, folder: Path) -> None:
    found = definition(folder / "{tenant}" / "{adapter}" / "*.jsonl")
    path = write(folder / "acme" / "support" / "monday.jsonl", lines("a"), age=1)
    waiting = scan_sources(registry, found, now=NOW)
    assert (waiting.added, waiting.waiting) == (0, (path.as_uri(),)) and new_files(registry) == {}
    assert scan_sources(registry, found, now=NOW + 10).added == 1


def test_a_source_that_cannot_be_read_fails_alone(registry: Registry, folder: Path) -> None:
    write(folder / "acme" / "support" / "monday.jsonl", lines("a"))
    write(folder / "acme" / "support" / "empty.jsonl", "")
    write(folder / "other" / "support" / "monday.jsonl", lines("a"))
    found = definition("nosuch://{tenant}/{adapter}/*", folder / "{tenant}" / "{adapter}" / "*.jsonl")
    scan = scan_sources(registry, found, now=NOW)
    assert scan.added == 1 and new_files(registry) == {"acme/support": ["monday.jsonl"]}
    reasons = {each.url.rpartition("/data/")[2]: each.reason for each in scan.problems}
    assert "nosuch" in reasons["nosuch://{tenant}/{adapter}/*"]
    assert "empty" in reasons["acme/support/empty.jsonl"]
    assert "other" in reasons["other/support/monday.jsonl"]
    # A file without rows is read again only when it changes; the tenant may be created later.
    assert len(scan_sources(registry, found, now=NOW).problems) == 2


def test_bad_rows_of_a_file_stay_for_the_quarantine(registry: Registry, folder: Path) -> None:
    write(folder / "acme" / "a" / "x.jsonl", f"not JSON\n{lines('a')}" + '{"prompt": "b", "completion": ""}\n')
    write(folder / "acme" / "a" / "y.csv", "prompt,completion\nc,yes\nd,\n")
    assert scan_sources(registry, definition(folder / "{tenant}/{adapter}/*"), now=NOW).added == 2
    with registry.reading() as session:
        (data,) = nightly.pending_data(session)
        found = [datasets.get(session, each) for each in data.train]
    x, y = (registry.artifacts.read(each.artifact, "data.jsonl").splitlines() for each in found)
    assert (len(x), x[0], found[0].examples) == (3, b"not JSON", 3)
    assert [json.loads(row)["completion"] for row in y] == ["yes", ""]


def test_an_excluded_adapter_is_left_alone_and_a_deleted_one_forgotten(registry: Registry, folder: Path) -> None:
    pattern = folder / "{tenant}" / "{adapter}" / "*.jsonl"
    write(folder / "acme" / "support" / "monday.jsonl", lines("a"))
    assert scan_sources(registry, definition(pattern, exclude=["acme/*"]), now=NOW).added == 0
    assert scan_sources(registry, definition(pattern), now=NOW).added == 1
    name = AdapterName("acme", "support")
    with registry.writing() as session:
        assert len(sources.list_files(session, name)) == 1
        deletion.delete_adapter(session, name)
        assert sources.list_files(session, name) == []


@pytest.mark.parametrize(
    ("state", "modified", "seen", "action"),
    [
        ("1", 0.0, None, FileAction.READ),
        ("1", 98.0, None, FileAction.WAIT),
        ("1", 0.0, ("1", True), FileAction.SKIP),
        ("2", 0.0, ("1", True), FileAction.READ),
        ("1", 0.0, ("1", False), FileAction.READ),
        ("1", None, None, FileAction.WAIT),
        ("1", None, ("1", False), FileAction.READ),
        ("2", None, ("1", False), FileAction.WAIT),
    ],
)
def test_when_a_file_is_read(
    state: str, modified: float | None, seen: tuple[str, bool] | None, action: FileAction
) -> None:
    record = seen and SourceFileRecord(adapter="acme/a", url="x", state=seen[0], settled=seen[1])
    assert decide(state, modified, record or None, now=100.0) is action


def test_names_are_taken_from_the_path() -> None:
    pattern = "bucket/{tenant}/x-{adapter}/{tenant}/*.jsonl"
    assert names_in(pattern, "bucket/acme/x-support/acme/1.jsonl") == {"tenant": "acme", "adapter": "support"}
    assert names_in(pattern, "bucket/acme/x-support/bolt/1.jsonl") is None
    assert owners({}, ["acme/a", "bolt/*"], ["bolt/b", "crab/c"]) == [
        AdapterName("acme", "a"),
        AdapterName("bolt", "b"),
    ]
    assert owners({"tenant": "bolt"}, ["*"], ["acme/a", "bolt/b"]) == [AdapterName("bolt", "b")]
    assert owners({"tenant": "acme", "adapter": "Bad Name"}, ["*"], []) == []


def only_problem(scan: SourceScan) -> str:
    (problem,) = scan.problems
    return problem.reason


def test_no_folders_between_are_folders_too(registry: Registry, folder: Path) -> None:
    for place in ("acme/a/x.jsonl", "acme/a/deep/er/y.jsonl"):
        write(folder / place, lines(place))
    assert scan_sources(registry, definition(folder / "{tenant}/{adapter}/**/*.jsonl"), now=NOW).added == 2
    assert new_files(registry) == {"acme/a": ["y.jsonl", "x.jsonl"]}
    assert names_in("/d/{adapter}/[!._]*", "/d/a/x") == {"adapter": "a"} and names_in("/d/[!._]*", "/d/.x") is None


def test_a_folder_that_is_not_there_is_named(registry: Registry, folder: Path) -> None:
    found = definition(folder / "{tenant}" / "{adapter}" / "*.jsonl")
    assert only_problem(scan_sources(registry, found, now=NOW)) == (
        f"There is no folder {folder}: create or mount it, or correct the URL in nightly.yaml."
    )
    folder.mkdir()
    assert scan_sources(registry, found, now=NOW).problems == ()


def test_a_file_from_the_future_is_read_at_the_second_look(registry: Registry, folder: Path) -> None:
    found = definition(folder / "{tenant}" / "{adapter}" / "*.jsonl")
    write(folder / "acme" / "a" / "x.jsonl", lines("a"), age=-1e6)
    assert [scan_sources(registry, found, now=NOW).added for _ in range(3)] == [0, 1, 0]


def test_links_folders_and_pipes_among_the_files(registry: Registry, folder: Path) -> None:
    place = folder / "acme" / "a"
    real = write(folder / "kept" / "real.txt", lines("a"))
    place.mkdir(parents=True)
    (place / "link.jsonl").symlink_to(real)
    (place / "broken.jsonl").symlink_to(folder / "nothing")
    (place / "loop.jsonl").symlink_to(place / "loop.jsonl")
    (place / "around.jsonl").symlink_to(folder)
    (place / "folder.jsonl").mkdir()
    os.mkfifo(place / "pipe.jsonl")
    scan = scan_sources(registry, definition(folder / "{tenant}" / "{adapter}" / "*.jsonl"), now=NOW)
    assert scan.added == 1 and new_files(registry) == {"acme/a": ["link.jsonl"]}
    assert [each.url.rpartition("/")[2] for each in scan.problems] == ["broken.jsonl", "loop.jsonl"]
    assert "No such file" in scan.problems[0].reason


def test_a_file_that_is_too_large_is_not_read(registry: Registry, folder: Path) -> None:
    found = definition(folder / "{tenant}" / "{adapter}" / "*.jsonl")
    write(folder / "acme" / "a" / "x.jsonl", lines("a" * 1000))
    reason = only_problem(scan_sources(registry, found, now=NOW, max_bytes=1000))
    assert reason.startswith("acme/a: it has 10") and "may have 1000" in reason
    assert scan_sources(registry, found, now=NOW).added == 1


@pytest.mark.parametrize(
    "error",
    [PermissionError(13, "Permission denied"), RuntimeError("no such codec"), DiskFull("The disk is full.")],
)
def test_whatever_a_file_raises_the_others_are_read(
    registry: Registry, folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    read = files.convert

    def convert(filename: str, *rest: object) -> bytes:
        if filename == "bad.jsonl":
            raise error
        return read(filename, *rest)  # type: ignore[arg-type]

    write(folder / "acme" / "a" / "bad.jsonl", lines("a"))
    write(folder / "acme" / "b" / "good.jsonl", lines("b"))
    found = definition(folder / "{tenant}" / "{adapter}" / "*.jsonl")
    with monkeypatch.context() as patched:
        patched.setattr(files, "convert", convert)
        scan = scan_sources(registry, found, now=NOW)
    assert scan.added == 1 and str(error) in only_problem(scan)
    assert scan_sources(registry, found, now=NOW).added == 1, "it is read when it can be"


def test_files_of_other_stores_are_found(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    store = fsspec.filesystem("memory")
    store.pipe_file("/nights/acme/a/x.jsonl", lines("a").encode())
    found = definition("memory://nights/{tenant}/{adapter}/*.jsonl")
    later = time.time() + 60
    assert scan_sources(registry, found, now=later).added == 1
    assert scan_sources(registry, found, now=later) == SourceScan()
    assert "/days" in only_problem(scan_sources(registry, definition("memory://days/{tenant}/{adapter}/*"), now=later))
    monkeypatch.setitem(sys.modules, "s3fs", None)
    scan = scan_sources(registry, definition("s3://user:secret@bucket/{tenant}/{adapter}/*"), now=later)
    assert "s3fs" in only_problem(scan) and "secret" not in scan.model_dump_json()


def test_bytes_that_are_not_text_stay_for_the_quarantine(registry: Registry, folder: Path) -> None:
    path = write(folder / "acme" / "a" / "x.jsonl", lines("a"))
    path.write_bytes(lines("a").encode() + b'{"prompt": "caf\xe9", "completion": "yes"}\n' + b"\x00" * 10 + b"\n")
    write(folder / "acme" / "b" / "x.csv", "")
    (folder / "acme" / "b" / "x.csv").write_bytes("prompt,completion\ncafé,yes\n".encode("latin-1"))
    for each in (path, folder / "acme" / "b" / "x.csv"):
        os.utime(each, (NOW - 60, NOW - 60))
    scan = scan_sources(registry, definition(folder / "{tenant}/{adapter}/*"), now=NOW)
    assert new_files(registry) == {"acme/a": ["x.jsonl"]}
    assert only_problem(scan).startswith("acme/b: x.csv: byte 22 is not UTF-8 (in Windows-1252 it is 'é')")
