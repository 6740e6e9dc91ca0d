"""The source "feedback": what users corrected and rated becomes datasets, each piece of feedback once.

Datasets, the adapter's new data and the marks of what was used are one transaction: a run that is killed neither loses
feedback nor uses it twice. Only what is stored at that moment is used; the feedback of a tenant that has withdrawn its
consent is not.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial

from sqlalchemy.orm import Session

from loramill.data.examples import row_format
from loramill.data.jsonl import iter_rows
from loramill.names import AdapterName
from loramill.pipelines.nightly.context import NightlyContext
from loramill.pipelines.nightly.sources.feedback_rows import (
    Form,
    PreparedRow,
    UnusableFeedback,
    examples_of,
    form_of,
    pairs_of,
)
from loramill.registry import ArtifactStore, Registry, datasets, nightly
from loramill.registry.feedback import use
from loramill.registry.feedback.use import UnusedFeedback
from loramill.submission.dataset_checks import DATA_FILE
from loramill.submission.request import JobRequest, LoramillOptions
from loramill.types import FrozenModel

log = logging.getLogger(__name__)


class CollectedFeedback(FrozenModel):
    """What was made of an adapter's feedback.

    Attributes:
        examples: number of examples that were added to the adapter's new data.
        examples_file: ID of their dataset; None: there are none.
        pairs: number of preference pairs.
        pairs_file: ID of their dataset, which `preference_request` trains on; None: there are none.
        unusable: why each piece of feedback that can't be used can't.
        waiting: number of pieces that wait, since their form is not that of the adapter's other data.
    """

    adapter: str
    examples: int = 0
    examples_file: str | None = None
    pairs: int = 0
    pairs_file: str | None = None
    unusable: tuple[str, ...] = ()
    waiting: int = 0


def collect_feedback(registry: Registry, *, corrections: bool = True, ratings: bool = True) -> list[CollectedFeedback]:
    """Makes datasets of the unused feedback of all adapters.

    Args:
        corrections: whether corrections become examples of the adapters' new data.
        ratings: whether ratings and corrections become preference pairs.
    """
    with registry.reading() as session:
        names = use.adapters_with_unused(session)
    return [collect_adapter(registry, name, corrections=corrections, ratings=ratings) for name in names]


def add_feedback(context: NightlyContext) -> None:
    """Makes datasets of the unused feedback of the adapters that this run has not begun with.

    A failure is one of the adapter's collection, and affects no other adapter.
    """
    begun = {step.adapter for step in context.steps()}
    with context.registry.reading() as session:
        names = [name for name in use.adapters_with_unused(session) if name not in begun]
    for name in names:
        context.attempt(name, "collect", partial(_collect, context.registry, name))


def _collect(registry: Registry, adapter: str) -> None:
    collected = collect_adapter(registry, adapter)
    log.info(
        "feedback on %s: %d examples and %d preference pairs; %d pieces can't be used, and %d wait",
        adapter,
        collected.examples,
        collected.pairs,
        len(collected.unusable),
        collected.waiting,
    )


def collect_adapter(
    registry: Registry, adapter: str, *, corrections: bool = True, ratings: bool = True
) -> CollectedFeedback:
    """Makes datasets of an adapter's unused feedback, as `collect_feedback` does."""
    name = AdapterName.parse(adapter)
    with registry.writing() as session:
        unused = use.lock_unused(session, name)
        form = _form(session, registry.artifacts, name, unused)
        fitting = [each for each in unused if form_of(each) == form]
        examples, bad_examples = examples_of(fitting) if corrections else ([], [])
        pairs, bad_pairs = pairs_of(fitting) if ratings else ([], [])
        examples_file = _freeze(session, registry.artifacts, name, "corrections", examples)
        if examples_file is not None:
            nightly.add_data(session, name, examples_file, None)
        pairs_file = _freeze(session, registry.artifacts, name, "pairs", pairs)
        use.mark_examples(session, _ids(examples), examples_file)
        use.mark_examples(session, _ids(bad_examples), None)
        use.mark_pairs(session, _ids(pairs), pairs_file)
        use.mark_pairs(session, _ids(bad_pairs), None)
    return CollectedFeedback(
        adapter=adapter,
        examples=len(examples),
        examples_file=examples_file,
        pairs=len(pairs),
        pairs_file=pairs_file,
        unusable=tuple(dict.fromkeys(each.reason for each in (*bad_examples, *bad_pairs))),
        waiting=len(unused) - len(fitting),
    )


def preference_request(adapter: str, pairs_file: str) -> JobRequest:
    """Returns the request of a DPO job that continues the adapter's champion with pairs of its feedback."""
    options = LoramillOptions(objective="dpo", start_from="champion")
    return JobRequest(AdapterName.parse(adapter), pairs_file, options=options)


def _form(session: Session, artifacts: ArtifactStore, name: AdapterName, unused: Sequence[UnusedFeedback]) -> Form:
    """The form of the adapter's other supervised data; without such data, that of the oldest feedback."""
    for file in nightly.next_training_files(session, name):
        with artifacts.open(file.artifact, DATA_FILE) as content:
            kind, chat = row_format(next(iter_rows(content))[1])
        if kind == "supervised":
            return "messages" if chat else "prompt"
    return form_of(unused[0]) if unused else "messages"


def _freeze(
    session: Session, artifacts: ArtifactStore, name: AdapterName, kind: str, rows: Sequence[PreparedRow]
) -> str | None:
    if not rows:
        return None
    raw = b"".join(each.row + b"\n" for each in rows)
    artifact = artifacts.put({DATA_FILE: raw})
    return datasets.create(session, name.tenant, f"{name.adapter}-{kind}.jsonl", artifact, len(raw), len(rows)).id


def _ids(rows: Sequence[PreparedRow] | Sequence[UnusableFeedback]) -> list[str]:
    return [id_ for row in rows for id_ in row.feedback]
