"""`client.files`: uploaded, validated datasets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import quote

from loramill.client.models import File, FileCheck, parse_object
from loramill.data.ingest import Columns, PreparedSource, read_source
from loramill.errors import InvalidRequest
from loramill.submission.options import drop_none

if TYPE_CHECKING:
    from loramill.client.http import Transport
    from loramill.client.uploads import Source

_FILES = "/v1/files"


class FilesResource:
    """Datasets that tenants have uploaded.

    A source of examples is a path (JSONL, JSON, CSV, TSV, Parquet, Arrow, or a folder that `datasets` saved), a dataset
    on a hub (`hf:org/name:split`), JSONL as bytes, or an uploaded file (or its id, `file-…`).
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def upload(
        self,
        data: Source,
        *,
        tenant: str | None = None,
        filename: str = "train.jsonl",
        columns: Columns = None,
        reuse: bool = False,
    ) -> File:
        """Uploads examples; the gateway validates them before it answers.

        Args:
            data: Source of the examples.
            tenant: Tenant that owns the file. Default: the API key's own.
            filename: Name of the file if `data` is bytes.
            columns: Column of each field, such as {"prompt": "question", "completion": "answer"}. Default: detected.
            reuse: Return the tenant's existing file if it has one with the same content.

        Raises:
            DatasetInvalid: Examples are invalid; the message gives file, line and field of every problem.
            InvalidRequest: The source can't be read.
        """
        if isinstance(data, File):
            return data
        prepared = _prepare(data, filename, columns)
        form = {"purpose": "fine-tune", **({"reuse": "true"} if reuse else {})}
        upload = {"file": (prepared.name, prepared.content)}
        file = File.from_wire(self._transport.request_json("POST", _FILES, tenant=tenant, data=form, files=upload))
        warnings = (*prepared.warnings, *file.warnings)
        return file.model_copy(update={"format": prepared.format, "warnings": warnings})

    def check(
        self,
        data: Source,
        *,
        tenant: str | None = None,
        columns: Columns = None,
        valid: bool = False,
        max_length: int | None = None,
        train_on: Literal["last", "all"] | None = None,
    ) -> FileCheck:
        """Describes what a job would train on, as the base's chat template renders it. Nothing is stored.

        Args:
            data: Source of the examples; not an uploaded file.
            tenant: Tenant that would own the file. Default: the API key's own.
            columns: As for `upload`.
            valid: Whether the examples are for validation, which has no minimum number.
            max_length: As for `client.jobs.submit`.
            train_on: As for `client.jobs.submit`.

        Raises:
            DatasetInvalid: Examples are invalid, too few, or too long for a job.
            InvalidRequest: The source can't be read, or is an uploaded file.
        """
        if isinstance(data, File) or (isinstance(data, str) and data.startswith("file-")):
            raise InvalidRequest("An uploaded file was checked when it was uploaded; give the data itself.")
        prepared = _prepare(data, "train.jsonl", columns)
        form = drop_none({"max_length": max_length, "train_on": train_on})
        form["use"] = "validation" if valid else "training"
        upload = {"file": (prepared.name, prepared.content)}
        found = self._transport.request_json("POST", f"{_FILES}/check", tenant=tenant, data=form, files=upload)
        warnings = (*prepared.warnings, *filter(None, (found.get("status_details") or "").split("\n")))
        return parse_object(FileCheck, {**found, "format": prepared.format, "warnings": warnings})

    def get(self, file_id: str) -> File:
        """Returns the description of one file."""
        return File.from_wire(self._transport.request_json("GET", _file_path(file_id)))

    def content(self, file_id: str) -> Iterator[bytes]:
        """Yields the bytes of a file in chunks. The results file of a job is CSV."""
        with self._transport.stream(f"{_file_path(file_id)}/content") as content:
            yield from content

    def delete(self, file_id: str) -> None:
        """Deletes a file.

        Raises:
            Conflict: An unfinished job or the next nightly run needs it.
        """
        self._transport.request_json("DELETE", _file_path(file_id))

    def list(self, tenant: str | None = None) -> Iterator[File]:
        """Yields uploaded files, newest first: the key's own, or for an admin's key those of `tenant` or of all."""
        return (File.from_wire(row) for row in self._transport.paginate(_FILES, tenant=tenant))


def _prepare(data: Path | str | bytes | PreparedSource, filename: str, columns: Columns) -> PreparedSource:
    if isinstance(data, PreparedSource):
        return data
    if isinstance(data, bytes):
        return PreparedSource(filename, data, "JSONL")
    return read_source(data, columns)


def _file_path(file_id: str) -> str:
    return f"{_FILES}/{quote(file_id, safe='')}"
