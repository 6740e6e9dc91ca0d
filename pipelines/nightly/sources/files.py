"""Scans the sources of nightly runs for new files; each becomes a dataset of its tenant and new data exactly once."""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any

from loramill.data import jsonl
from loramill.data.ingest import Columns, read_source
from loramill.errors import DatasetInvalid, LoramillError
from loramill.names import AdapterName
from loramill.pipelines.nightly.definition import NightlyDefinition, SourceDefinition
from loramill.pipelines.nightly.sources.pattern import glob_of, names_in, owners
from loramill.pipelines.nightly.sources.policy import FileAction, decide
from loramill.registry import Registry, adapters, datasets, nightly, sources
from loramill.storage.object_store import open_filesystem, redacted_url, translate_store_errors
from loramill.types import SourceFileRecord, SourceProblem, SourceScan

#: Suffixes of files whose lines are checked one by one even if the first of them is wrong.
_LINES = (".jsonl", ".ndjson")


@dataclass(frozen=True, slots=True)
class FoundFile:
    """A file that a source's glob matches.

    Attributes:
        state: size and ETag or time of modification.
        modified: seconds since the epoch; None if storage does not report it.
    """

    path: str
    url: str
    names: Mapping[str, str]
    state: str
    modified: float | None


@dataclass(slots=True)
class _Findings:
    seen: dict[AdapterName, dict[str, SourceFileRecord]] = field(default_factory=dict)
    added: int = 0
    waiting: list[str] = field(default_factory=list)
    problems: list[SourceProblem] = field(default_factory=list)

    def files(self, registry: Registry, name: AdapterName) -> dict[str, SourceFileRecord]:
        """The files of an adapter that were seen, by URL; read from the database once."""
        if name not in self.seen:
            with registry.reading() as session:
                self.seen[name] = {each.url: each for each in sources.list_files(session, name)}
        return self.seen[name]

    def scan(self) -> SourceScan:
        return SourceScan(added=self.added, waiting=tuple(self.waiting), problems=tuple(self.problems))


def scan_sources(registry: Registry, definition: NightlyDefinition, *, now: float | None = None) -> SourceScan:
    """Adds the files of all sources that were not read in their present state to the new data of their adapters.

    A source or file that cannot be read is reported, and does not stop the others.

    Args:
        registry: where datasets and new data are recorded.
        definition: its `sources` are scanned, for the adapters that it includes.
        now: the time of the scan; default: the clock's.
    """
    findings = _Findings()
    moment = time.time() if now is None else now
    with registry.reading() as session:
        existing = [adapter.name for adapter in adapters.list_adapters(session, None)] if definition.sources else []
    for source in definition.sources:
        try:
            files, _ = open_filesystem(source.url)
            with translate_store_errors(source.url):
                found = list(find_files(source))
            for file in found:
                for name in owners(file.names, source.adapters, existing):
                    if definition.includes(str(name)):
                        _look(registry, files, source, file, name, moment, findings)
        except (LoramillError, OSError) as error:
            findings.problems.append(SourceProblem(url=redacted_url(source.url), reason=_reason(error)))
    return findings.scan()


def find_files(source: SourceDefinition) -> Iterator[FoundFile]:
    """The files that a source's URL matches, by path."""
    files, pattern = open_filesystem(source.url)
    files.invalidate_cache()
    for path, info in sorted(files.glob(glob_of(pattern), detail=True).items()):
        names = names_in(pattern, path)
        if info.get("type") != "file" or names is None:
            continue
        modified = _modified(info)
        version = info.get("ETag") or info.get("etag") or info.get("md5Hash") or modified
        yield FoundFile(path, files.unstrip_protocol(path), names, f"{info.get('size')} {version}", modified)


def _look(
    registry: Registry,
    files: Any,
    source: SourceDefinition,
    file: FoundFile,
    name: AdapterName,
    now: float,
    findings: _Findings,
) -> None:
    seen = findings.files(registry, name)
    record = SourceFileRecord(adapter=str(name), url=file.url, state=file.state, settled=False)
    action = decide(file.state, file.modified, seen.get(file.url), now)
    if action is FileAction.WAIT:
        findings.waiting.append(redacted_url(file.url))
        before = seen.get(file.url)
        waiting = record if before is None else before.model_copy(update={"state": file.state, "settled": False})
        with registry.writing() as session:
            sources.record_file(session, name, waiting)
    elif action is FileAction.READ:
        try:
            with translate_store_errors(file.url):
                raw = files.cat_file(file.path)
            findings.added += _add(registry, source, file, name, raw, record, seen)
        except (LoramillError, OSError) as error:
            reason = _reason(error)
            findings.problems.append(SourceProblem(url=redacted_url(file.url), reason=f"{name}: {reason}"))


def _add(
    registry: Registry,
    source: SourceDefinition,
    file: FoundFile,
    name: AdapterName,
    raw: bytes,
    record: SourceFileRecord,
    seen: dict[str, SourceFileRecord],
) -> bool:
    """Makes a file new data of an adapter, in one transaction; False if it has the content of one that was read."""
    content = hashlib.sha256(raw).hexdigest()
    settled = record.model_copy(update={"settled": True, "content": content})
    same = next((each for each in seen.values() if each.content == content and each.dataset is not None), None)
    if same is not None:
        seen[file.url] = settled.model_copy(update={"dataset": same.dataset})
        with registry.writing() as session:
            sources.record_file(session, name, seen[file.url])
        return False
    filename = PurePosixPath(file.path).name
    try:
        converted = convert(filename, raw, source)
    except DatasetInvalid as error:
        with registry.writing() as session:
            # It is read again when it changes.
            sources.record_file(session, name, settled.model_copy(update={"error": error.message}))
        raise
    artifact = registry.artifacts.put({"data.jsonl": converted})
    rows = sum(1 for _ in jsonl.iter_rows(converted))
    with registry.writing() as session:
        dataset = datasets.create(session, name.tenant, filename, artifact, len(converted), rows)
        nightly.add_data(session, name, dataset.id, None)
        added = settled.model_copy(update={"dataset": dataset.id})
        sources.record_file(session, name, added)
    seen[file.url] = added
    return True


def convert(filename: str, raw: bytes, source: SourceDefinition) -> bytes:
    """A file as JSONL; rows that are wrong stay as they are, and collection quarantines them.

    Raises:
        DatasetInvalid: it has no rows, or its format is unknown.
    """
    columns: Columns = source.columns or ("auto" if source.columns is not None else None)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / filename
        path.write_bytes(raw)
        try:
            return read_source(path, columns, keep_bad_rows=True).content
        except DatasetInvalid:
            if path.suffix.lower() not in _LINES or not raw.strip():
                raise
            return raw


def _modified(info: Mapping[str, Any]) -> float | None:
    for key in ("mtime", "LastModified", "last_modified", "updated", "created"):
        value = info.get(key)
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, int | float):
            return float(value)
        if isinstance(value, str):
            try:
                return datetime.fromisoformat(value).timestamp()
            except ValueError:
                continue
    return None


def _reason(error: Exception) -> str:
    return error.message if isinstance(error, LoramillError) else f"{type(error).__name__}: {error}"
