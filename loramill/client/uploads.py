"""The files that one call of the client uploads, which are deleted if the call is refused."""

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
    from loramill.client.jobs import JobsResource

#: Where examples come from: the path of a file (JSONL, JSON, CSV, TSV, Parquet or Arrow, compressed or not) or of a
#: folder that `datasets` saved, a data set of a hub (`hf:org/name`, `hf:org/name:split`), JSONL as bytes, what
#: `loramill.data.ingest.read_source` made of one of them, or an uploaded file (or its id, `file-…`).
Source = Path | str | bytes | PreparedSource | File

#: Called with each file that was uploaded: `recognized` and `warnings` are for the person who gave it.
OnUpload = Callable[[File], None]


class Uploads:
    """Uploads in a block; if the gateway refuses something in it, those of them that nothing needs are deleted."""

    def __init__(self, client: JobsResource, on_upload: OnUpload | None = None) -> None:
        self._client = client
        self._on_upload = on_upload or (lambda file: None)
        self._new: list[str] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not isinstance(error, LoramillError) or isinstance(error, NotRunning | Unavailable):
            return
        for file_id in self._new:
            with suppress(LoramillError):  # a job needs it; the first error is the one to raise
                self._client.delete_file(file_id)

    def train(self, source: Source, tenant: str, columns: Columns) -> str:
        """The id of the file of a training source."""
        return self._file_id(source, tenant, "train.jsonl", columns)

    def valid(self, source: Source | None, tenant: str, columns: Columns, valid_columns: Columns) -> str | None:
        """The id of the file of a validation source, read by its own columns, or the training file's if it has them."""
        if source is None:
            return None
        return self._file_id(read_valid(source, columns, valid_columns), tenant, "valid.jsonl", None)

    def _file_id(self, source: Source, tenant: str, filename: str, columns: Columns) -> str:
        if isinstance(source, File):
            return source.id
        if isinstance(source, str) and _is_file_id(source):
            return source
        file = self._client.upload(source, tenant=tenant, filename=filename, columns=columns, reuse=True)
        if not file.reused:
            self._new.append(file.id)
        self._on_upload(file)
        return file.id


def read_valid(source: Source, columns: Columns, valid_columns: Columns) -> Source:
    """A validation source read by its own columns, or the training file's if it has them; an id is returned."""
    if not isinstance(source, str | Path) or (isinstance(source, str) and _is_file_id(source)):
        return source
    own = valid_columns is not None
    return read_source(source, valid_columns if own else columns, columns_optional=not own)


def _is_file_id(source: str) -> bool:
    return source.startswith("file-")
