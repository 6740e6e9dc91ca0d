"""Scans the sources of nightly runs for new files; each becomes a dataset of its tenant and new data exactly once."""

from __future__ import annotations

import hashlib
import logging
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from loramill.data import jsonl
from loramill.data.ingest import Columns, read_source
from loramill.errors import DatasetInvalid, LoramillError, SetupError
from loramill.names import AdapterName
from loramill.pipelines.nightly.definition import NightlyDefinition, SourceDefinition
from loramill.pipelines.nightly.sources.pattern import bucket_of, fixed_folder, glob_of, names_in, owners
from loramill.pipelines.nightly.sources.policy import FileAction, decide
from loramill.registry import Registry, adapters, datasets, nightly, sources
from loramill.settings import ServeSettings
from loramill.storage.object_store import open_filesystem, redacted_url, translate_store_errors
from loramill.types import SourceFileRecord, SourceProblem, SourceScan

#: Suffixes of files whose lines are checked one by one even if the first of them is wrong.
_LINES = (".jsonl", ".ndjson")
#: Maximum size of a file that is read, as of an upload.
MAX_BYTES = ServeSettings().max_upload_bytes
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FoundFile:
    """A file that a source's glob matches.

    Attributes:
        state: size and ETag or time of modification.
        size: in bytes; 0 if storage does not report it.
        modified: seconds since the epoch; None if storage does not report it.
    """

    path: str
    url: str
    names: Mapping[str, str]
    state: str
    size: int
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

    @contextmanager
    def problem_of(self, url: str, prefix: str = "") -> Iterator[None]:
        """Records why a source, or a file of it, could not be read, so that the others are."""
        try:
            yield
        except LoramillError as error:
            reason = error.message
        except Exception as error:  # storage and the readers of many formats raise what they like
            if not isinstance(error, OSError):
                log.exception("%s could not be read", redacted_url(url))
            reason = f"{type(error).__name__}: {error}"
        else:
            return
        self.problems.append(SourceProblem(url=redacted_url(url), reason=prefix + reason))

    def scan(self) -> SourceScan:
        return SourceScan(added=self.added, waiting=tuple(self.waiting), problems=tuple(self.problems))


def scan_sources(
    registry: Registry, definition: NightlyDefinition, *, now: float | None = None, max_bytes: int = MAX_BYTES
) -> SourceScan:
    """Adds the files of all sources that were not read in their present state to the new data of their adapters.

    A source or file that cannot be read is reported, and does not stop the others.

    Args:
        registry: where datasets and new data are recorded.
        definition: its `sources` are scanned, for the adapters that it includes.
        now: the time of the scan; default: the clock's.
        max_bytes: larger files are not read, since a file is read into memory.
    """
    findings = _Findings()
    moment = time.time() if now is None else now
    with registry.reading() as session:
        existing = [adapter.name for adapter in adapters.list_adapters(session, None)] if definition.sources else []
    for source in definition.sources:
        found: list[FoundFile] = []
        with findings.problem_of(source.url), translate_store_errors(source.url):
            found += find_files(source)
        for file in found:
            for name in owners(file.names, source.adapters, existing):
                if definition.includes(str(name)):
                    with findings.problem_of(file.url, f"{name}: "):
                        _look(registry, source, file, name, moment, max_bytes, findings)
    return findings.scan()


def find_files(source: SourceDefinition) -> Iterator[FoundFile]:
    """The files that a source's URL matches, by path.

    Raises:
        SetupError: no installed backend can open the URL, or it is in a folder of this machine that does not exist.
        OSError: the bucket does not exist, in the words of the backend.
    """
    files, pattern = open_filesystem(source.url)
    files.invalidate_cache()
    # Object stores have no folders. A folder that is not mounted would look like one without new files for weeks.
    local = isinstance(files, LocalFileSystem)
    if local and not (folder := fixed_folder(pattern)).is_dir():
        raise SetupError(f"There is no folder {folder}: create or mount it, or correct the URL in nightly.yaml.")
    matching = files.glob(glob_of(pattern), detail=True)
    if not matching and not local and (bucket := bucket_of(pattern)):
        files.ls(bucket)  # raises if the bucket does not exist, for which a glob only finds nothing
    for path, found in sorted(matching.items()):
        info = _linked(path) if found.get("islink") else found
        names = names_in(pattern, path)
        if info.get("type") != "file" or names is None:
            continue
        modified = _modified(info)
        version = info.get("ETag") or info.get("etag") or info.get("md5Hash") or modified
        size = info.get("size")
        yield FoundFile(path, files.unstrip_protocol(path), names, f"{size} {version}", size or 0, modified)


def _look(
    registry: Registry,
    source: SourceDefinition,
    file: FoundFile,
    name: AdapterName,
    now: float,
    max_bytes: int,
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
        if file.size > max_bytes:
            raise DatasetInvalid(
                f"it has {file.size} bytes, and may have {max_bytes} (serve.max_upload_bytes): split it."
            )
        files, _ = open_filesystem(source.url)
        with translate_store_errors(file.url):
            raw = files.cat_file(file.path)
        findings.added += _add(registry, source, file, name, raw, record, seen)


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


def _linked(path: str) -> Mapping[str, Any]:
    """What a link of this machine leads to; fsspec reports the link itself."""
    try:
        found = Path(path).stat()
    except OSError:  # reading it fails with the reason
        return {"type": "file", "mtime": 0.0}
    return {"type": "file" if stat.S_ISREG(found.st_mode) else "other", "size": found.st_size, "mtime": found.st_mtime}


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
