"""Evaluations: metrics of a version, or of the base alone, on held-out examples."""

from __future__ import annotations

import time
from collections.abc import Mapping

from sqlalchemy import select
from sqlalchemy.orm import Session

from loramill.names import AdapterName
from loramill.registry import adapters
from loramill.registry.database.tables import EvaluationRow
from loramill.types import EvaluationRecord


def add(
    session: Session,
    name: AdapterName | str,
    version: str | None,
    dataset: str,
    slice: str,  # noqa: A002
    examples: int,
    metrics: Mapping[str, float],
) -> EvaluationRecord:
    """Records the metrics (finite numbers) of a version, or of the base (None), on `examples` examples of a dataset.

    Raises:
        NotFound: there is no such adapter.
    """
    adapters.get(session, name)
    row = EvaluationRow(
        adapter=str(name),
        version=version,
        dataset=dataset,
        slice=slice,
        examples=examples,
        metrics=dict(metrics),
        created_at=time.time(),
    )
    session.add(row)
    session.flush()
    return EvaluationRecord.model_validate(row)


def list_evaluations(session: Session, name: AdapterName | str) -> list[EvaluationRecord]:
    """Returns the evaluations of an adapter, newest first."""
    statement = select(EvaluationRow).where(EvaluationRow.adapter == str(name)).order_by(EvaluationRow.id.desc())
    return [EvaluationRecord.model_validate(row) for row in session.scalars(statement)]
