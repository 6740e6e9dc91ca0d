"""The content of adapters: which examples nightly runs have trained on, and which they hold out, over all runs."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import delete as delete_from
from sqlalchemy import insert, select, update
from sqlalchemy.orm import Session

from loramill.names import AdapterName
from loramill.registry.database.tables import AdapterContentRow
from loramill.types import ContentRecord, ContentSide

#: Digests in one statement; SQLite's limit is 32766 values.
_BATCH = 10_000


def list_content(session: Session, name: AdapterName | str, side: ContentSide | None = None) -> list[ContentRecord]:
    """Returns the examples of an adapter whose side was decided, or those of one side, by digest."""
    columns = (AdapterContentRow.digest, AdapterContentRow.side, AdapterContentRow.sketch)
    used = AdapterContentRow.run.is_not(None) | AdapterContentRow.imported
    statement = select(*columns, used).where(AdapterContentRow.adapter == str(name))
    if side is not None:
        statement = statement.where(AdapterContentRow.side == side)
    return [
        ContentRecord(digest, found, sketch, bool(was_used))
        for digest, found, sketch, was_used in session.execute(statement.order_by(AdapterContentRow.digest))
    ]


def is_recorded(session: Session, name: AdapterName | str, dataset: str) -> bool:
    """Whether the examples of a dataset are recorded for an adapter."""
    statement = select(AdapterContentRow.digest).where(
        AdapterContentRow.adapter == str(name), AdapterContentRow.dataset == dataset
    )
    return session.scalar(statement.limit(1)) is not None


def record(
    session: Session,
    name: AdapterName | str,
    side: ContentSide,
    examples: Sequence[tuple[str, bytes]],
    *,
    dataset: str,
    run: str | None,
) -> None:
    """Records examples as trained on, or held out; what was recorded about them before is replaced.

    Args:
        session: the session.
        name: the adapter.
        side: what the examples are for.
        examples: their digests, all different, with their sketches.
        dataset: the dataset that contains them.
        run: the nightly run that uses them; None: they were imported from the champion's job.
    """
    digests = [digest for digest, _ in examples]
    for start in range(0, len(digests), _BATCH):
        some = AdapterContentRow.digest.in_(digests[start : start + _BATCH])
        session.execute(delete_from(AdapterContentRow).where(AdapterContentRow.adapter == str(name), some))
    rows = [
        {
            "adapter": str(name),
            "digest": digest,
            "side": side,
            "sketch": sketch,
            "dataset": dataset,
            "run": run,
            "imported": run is None,
        }
        for digest, sketch in examples
    ]
    if rows:
        session.execute(insert(AdapterContentRow), rows)


def move(session: Session, name: AdapterName | str, dataset: str, to: str) -> None:
    """Records that the examples of a dataset are in another one now, which contains all of them."""
    of_dataset = (AdapterContentRow.adapter == str(name), AdapterContentRow.dataset == dataset)
    session.execute(update(AdapterContentRow).where(*of_dataset).values(dataset=to))


def release(session: Session, run: str, name: AdapterName | str) -> None:
    """Records that a run's data was released: the examples keep their side, and count as new once more."""
    of_run = (AdapterContentRow.adapter == str(name), AdapterContentRow.run == run)
    session.execute(update(AdapterContentRow).where(*of_run).values(run=None))


def forget_sketches(session: Session, dataset: str) -> None:
    """Removes what the text of a deleted dataset's examples could be guessed from; their digests stay."""
    session.execute(update(AdapterContentRow).where(AdapterContentRow.dataset == dataset).values(sketch=b""))
