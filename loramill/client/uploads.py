"""Files that one call of the client uploads; they are deleted again if the gateway refuses the call."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from loramill.client.models import File
from loramill.data.ingest import Columns, PreparedSource, read_source
from loramill.errors import LoramillError, NotRunning, Unavailable

if TYPE_CHECKING:
    from loramill.client.files import FilesResource

#: A source of examples: the path of a file (JSONL, JSON, CSV, TSV, Parquet or Arrow, compressed or not) or of a folder
#: that `datasets` saved, a dataset on a hub (`hf:org/name`, `hf:org/name:split`), JSONL as bytes, the result of
#: `loramill.data.ingest.read_source`, or an uploaded file (or its id, `file-…`).
Source = Path | str | bytes | PreparedSource | File

#: Called with each uploaded file; its `format` and `warnings` are meant for the user.
OnUpload = Callable[[File], None]


class Uploads:
    """Uploads within a block. If the gateway refuses a request in the block, the new files are deleted again."""

    def __init__(self, files: FilesResource, on_upload: OnUpload | None = None) -> None:
        self._files = files
        self._on_upload = on_upload or (lambda file: None)
        self._new: list[str] = []
        self._reported: set[str] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not isinstance(error, LoramillError) or isinstance(error, NotRunning | Unavailable):
            return
        for file_id in self._new:
            with suppress(LoramillError):  # a job needs the file; the first error is the one to raise
                self._files.delete(file_id)

    def train(self, source: Source, tenant: str, columns: Columns) -> str:
        """Uploads a training source; returns the file's id."""
        return self._file_id(source, tenant, "train.jsonl", columns)

    def valid(self, source: Source | None, tenant: str, columns: Columns, valid_columns: Columns) -> str | None:
        """Uploads a validation source; returns the file's id, or None if there is no source."""
        if source is None:
            return None
        return self._file_id(read_valid(source, columns, valid_columns), tenant, "valid.jsonl", None)

    def _file_id(self, source: Source, tenant: str, filename: str, columns: Columns) -> str:
        if isinstance(source, File):
            return source.id
        if isinstance(source, str) and _is_file_id(source):
            return source
        file = self._files.upload(source, tenant=tenant, filename=filename, columns=columns, reuse=True)
        if not file.reused:
            self._new.append(file.id)
        if file.id not in self._reported:  # a file of jobs may name it several times
            self._reported.add(file.id)
            self._on_upload(file)
        return file.id


def read_valid(source: Source, columns: Columns, valid_columns: Columns) -> Source:
    """Reads a validation source by its own columns, or by the training file's if it has them; returns ids as is."""
    if not isinstance(source, str | Path) or (isinstance(source, str) and _is_file_id(source)):
        return source
    own = valid_columns is not None
    return read_source(source, valid_columns if own else columns, columns_optional=not own)


def _is_file_id(source: str) -> bool:
    return source.startswith("file-")
