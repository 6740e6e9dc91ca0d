"""Answers of models that a nightly run keeps until it has used them."""

from __future__ import annotations

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from loramill.names import AdapterName
from loramill.registry.database.tables import NightlyAnswerRow


def keep(session: Session, run: str, name: AdapterName | str, question: str, text: str, *, truncated: bool) -> None:
    """Keeps the answer to a question about an adapter; one that was kept before is replaced."""
    row = NightlyAnswerRow(run=run, adapter=str(name), question=question, text=text, truncated=truncated)
    session.merge(row)
    session.flush()


def list_answers(session: Session, run: str) -> dict[tuple[str, str], tuple[str, bool]]:
    """Returns the text of each kept answer, and whether it was truncated, by adapter and question."""
    rows = session.scalars(select(NightlyAnswerRow).where(NightlyAnswerRow.run == run))
    return {(row.adapter, row.question): (row.text, row.truncated) for row in rows}


def forget(session: Session, run: str, name: AdapterName | str | None = None) -> None:
    """Deletes the answers that a run has kept, about one adapter or about all (None)."""
    statement = delete(NightlyAnswerRow).where(NightlyAnswerRow.run == run)
    session.execute(statement if name is None else statement.where(NightlyAnswerRow.adapter == str(name)))
