"""Files of the sources of nightly runs: which were seen, and what they became."""

from __future__ import annotations

import time

from sqlalchemy import select
from sqlalchemy.orm import Session

from loramill.errors import NotFound
from loramill.names import AdapterName
from loramill.registry.database.tables import NightlyRunRow, SourceFileRow
from loramill.types import SourceFileRecord, SourceScan


def list_files(session: Session, name: AdapterName | str) -> list[SourceFileRecord]:
    """Returns the files of an adapter's sources that were seen, by URL."""
    statement = select(SourceFileRow).where(SourceFileRow.adapter == str(name)).order_by(SourceFileRow.url)
    return [SourceFileRecord.model_validate(row) for row in session.scalars(statement)]


def record_file(session: Session, name: AdapterName, file: SourceFileRecord) -> None:
    """Records a file as it was seen now; replaces what was recorded before."""
    row = SourceFileRow(**file.model_dump(), tenant=name.tenant, seen_at=time.time())
    session.merge(row)
    session.flush()


def record_scan(session: Session, run: str, scan: SourceScan) -> None:
    """Records what the scan of a run's sources found.

    Raises:
        NotFound: there is no such run.
    """
    row = session.get(NightlyRunRow, run)
    if row is None:
        raise NotFound(f"There is no nightly run '{run}'.", param="run")
    row.sources = scan.model_dump(mode="json")
    session.flush()
