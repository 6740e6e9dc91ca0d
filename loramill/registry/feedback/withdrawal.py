"""Withdraws deleted or changed feedback from the files made of it, unless something was trained on them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from sqlalchemy import delete as delete_from
from sqlalchemy import select, update
from sqlalchemy.orm import InstrumentedAttribute, Session

from loramill.errors import Conflict
from loramill.registry import datasets
from loramill.registry.database.tables import AdapterDataRow, DatasetRow, FeedbackRow, JobRow


def withdraw(session: Session, tenant: str, feedback: Iterable[FeedbackRow]) -> tuple[str, ...]:
    """Removes the files that have examples or pairs of this feedback, unless something was trained on them.

    The other feedback in such a file counts as unused again, so that the next collection makes another file of it.

    Returns:
        The files that have the feedback and stay: a nightly run has collected them, or a job uses them.
    """
    rows = list(feedback)
    examples = sorted({row.example_file for row in rows if row.example_file is not None})
    pairs = sorted({row.pair_file for row in rows if row.pair_file is not None})
    example_marks = (FeedbackRow.example_file, {"example_used_at": None, "example_file": None})
    pair_marks = (FeedbackRow.pair_file, {"pair_used_at": None, "pair_file": None})
    kept = [file for file in examples if not _withdraw_file(session, tenant, file, *example_marks)]
    kept += [file for file in pairs if not _withdraw_file(session, tenant, file, *pair_marks)]
    return tuple(dict.fromkeys(kept))


def _withdraw_file(
    session: Session,
    tenant: str,
    file: str,
    column: InstrumentedAttribute[str | None],
    unused: Mapping[str, None],
) -> bool:
    """Removes a file from its adapter's new data, and deletes it; the feedback that it is made of is unused again."""
    of_file = AdapterDataRow.train == file
    # Locked, so that no nightly run collects the file in the meantime.
    data = session.scalars(select(AdapterDataRow).where(of_file).with_for_update()).all()
    if any(row.run is not None for row in data):
        return False
    session.execute(delete_from(AdapterDataRow).where(of_file), execution_options={"synchronize_session": False})
    if not _delete_file(session, tenant, file):
        return False
    session.execute(update(FeedbackRow).where(column == file).values(**unused))
    return True


def _delete_file(session: Session, tenant: str, file: str) -> bool:
    """Deletes a file that no job was ever trained on; returns False if there is such a job."""
    trained = select(JobRow.id).where(JobRow.tenant == tenant, JobRow.spec["train"].as_string() == file).limit(1)
    if session.scalar(trained) is not None:
        return False
    if session.get(DatasetRow, file) is None:  # its tenant has deleted it
        return True
    try:
        datasets.delete(session, file, tenant)
    except Conflict:  # a job validates with it, or it is validation data of an adapter
        return False
    return True
