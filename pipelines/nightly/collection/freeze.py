"""Stores the datasets that a run freezes for an adapter, and reads the files of its new data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy.orm import Session

from loramill.data.examples import read_examples
from loramill.names import AdapterName
from loramill.pipelines.nightly.collection.counts import CollectedCounts
from loramill.pipelines.nightly.collection.rows import CheckedRows, NewFile, list_reasons, quarantine_file
from loramill.registry import ArtifactStore, datasets
from loramill.types import DatasetRecord, NewData


@dataclass(frozen=True, slots=True)
class Freezer:
    """Stores the datasets of one adapter in one run."""

    session: Session
    artifacts: ArtifactStore
    name: AdapterName

    def freeze(self, kind: str, rows: Sequence[bytes]) -> DatasetRecord:
        """Validates rows and stores them as a dataset, whose name ends with its kind."""
        filename = f"{self.name.adapter}-{kind}.jsonl"
        return freeze_rows(self.session, self.artifacts, self.name.tenant, filename, rows)


def freeze_rows(
    session: Session, artifacts: ArtifactStore, tenant: str, filename: str, rows: Sequence[bytes]
) -> DatasetRecord:
    """Validates rows and stores them as a dataset."""
    raw = b"\n".join(rows) + b"\n"
    examples = read_examples(raw, filename)
    return store_file(session, artifacts, tenant, filename, raw, len(examples.examples))


def store_file(
    session: Session, artifacts: ArtifactStore, tenant: str, filename: str, raw: bytes, rows: int
) -> DatasetRecord:
    """Stores a file of a tenant."""
    return datasets.create(session, tenant, filename, artifacts.put({"data.jsonl": raw}), len(raw), rows)


def new_files(session: Session, artifacts: ArtifactStore, new_data: NewData) -> list[NewFile]:
    """The files of an adapter's new data."""
    files = []
    for ids, validation in ((new_data.train, False), (new_data.valid, True)):
        for found in (datasets.get(session, each) for each in ids):
            files.append(NewFile(found.filename, artifacts.read(found.artifact, "data.jsonl"), validation, found.id))
    return files


def collected_result(freezer: Freezer, checked: CheckedRows, counts: CollectedCounts) -> dict[str, Any]:
    """The counts for the run's record, with the file of quarantined rows, which is stored here."""
    collected: dict[str, Any] = {"counts": counts.model_dump(mode="json")}
    if not checked.bad:
        return collected
    raw, filename = quarantine_file(checked.bad), f"{freezer.name.adapter}-quarantine.jsonl"
    file = store_file(freezer.session, freezer.artifacts, freezer.name.tenant, filename, raw, len(checked.bad))
    return collected | {"quarantine": {"file": file.id, "reasons": list_reasons(checked.bad)}}
