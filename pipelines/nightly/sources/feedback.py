"""The source "feedback": what users corrected and rated becomes datasets, each piece of feedback once.

Datasets, the adapter's new data and the marks of what was used are one transaction: a run that is killed neither loses
feedback nor uses it twice. Only what is stored at that moment is used; the feedback of a tenant that has withdrawn its
consent is not.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from contextlib import suppress
from functools import partial
from typing import BinaryIO

from sqlalchemy.orm import Session

from loramill.data.conversation import LineError
from loramill.data.examples import row_format
from loramill.data.jsonl import iter_rows
from loramill.data.preferences import DataKind
from loramill.names import AdapterName
from loramill.pipelines.nightly.context import NightlyContext
from loramill.pipelines.nightly.definition import FeedbackDefinition
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
from loramill.types import FrozenModel

#: What happens without a definition: all feedback is used.
EVERYTHING = FeedbackDefinition(min_pairs=1)

log = logging.getLogger(__name__)


class CollectedFeedback(FrozenModel):
    """What was made of an adapter's feedback.

    Attributes:
        examples: number of examples that were added to the adapter's new data.
        examples_file: ID of their dataset; None: there are none.
        pairs: number of preference pairs that were added to the adapter's new data.
        pairs_file: ID of their dataset; None: there are none.
        open_pairs: number of pairs that wait for others.
        unusable: why each piece of feedback that can't be used can't.
        waiting: number of pieces that wait, since their form is not that of the adapter's other data.
    """

    adapter: str
    examples: int = 0
    examples_file: str | None = None
    pairs: int = 0
    pairs_file: str | None = None
    open_pairs: int = 0
    unusable: tuple[str, ...] = ()
    waiting: int = 0


def collect_feedback(registry: Registry, rules: FeedbackDefinition = EVERYTHING) -> list[CollectedFeedback]:
    """Makes datasets of the unused feedback of all adapters, as `collect_adapter` does of one."""
    with registry.reading() as session:
        names = use.adapters_with_unused(session)
    return [collect_adapter(registry, name, rules) for name in names]


def add_feedback(context: NightlyContext) -> None:
    """Makes datasets of the unused feedback of the run's adapters, as nightly.yaml says, if it has not begun with them.

    A failure is one of the adapter's collection, and affects no other adapter.
    """
    begun = {step.adapter for step in context.steps()}
    with context.registry.reading() as session:
        unused = use.adapters_with_unused(session)
    names = [name for name in unused if name not in begun and context.definition.includes(name)]
    for name in names:
        context.attempt(name, "collect", partial(_collect, context, name))


def _collect(context: NightlyContext, adapter: str) -> None:
    definition = context.definition.for_adapter(adapter)
    fields = [each for each in (definition.split.by, definition.evaluate.slices_by) if each is not None]
    collected = collect_adapter(context.registry, adapter, definition.feedback, fields)
    log.info(
        "feedback on %s: %d examples and %d preference pairs, and %d pairs wait; %d pieces can't be used, and %d wait",
        adapter,
        collected.examples,
        collected.pairs,
        collected.open_pairs,
        len(collected.unusable),
        collected.waiting,
    )


def collect_adapter(
    registry: Registry, adapter: str, rules: FeedbackDefinition = EVERYTHING, fields: Collection[str] = ()
) -> CollectedFeedback:
    """Makes datasets of an adapter's unused feedback, which become its new data.

    Args:
        registry: the registry.
        adapter: its name.
        rules: what is used; pairs are once there are `min_pairs`.
        fields: what the rows' metadata has, of the completions' metadata and `user`.
    """
    name = AdapterName.parse(adapter)
    with registry.writing() as session:
        unused = use.lock_unused(session, name)
        form = _form(session, registry.artifacts, name, unused)
        fitting = [each for each in unused if form_of(each) == form]
        examples, bad_examples = examples_of(fitting, fields) if rules.corrections else ([], [])
        pairs, bad_pairs = pairs_of(fitting, fields) if rules.ratings else ([], [])
        pairs, waiting_pairs = (pairs, []) if len(pairs) >= rules.min_pairs else ([], pairs)
        examples_file = _freeze(session, registry.artifacts, name, "corrections", examples)
        if examples_file is not None:
            nightly.add_data(session, name, examples_file, None)
        pairs_file = _freeze(session, registry.artifacts, name, "pairs", pairs)
        if pairs_file is not None:
            nightly.add_data(session, name, pairs_file, None)
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
        open_pairs=len(waiting_pairs),
        unusable=tuple(dict.fromkeys(each.reason for each in (*bad_examples, *bad_pairs))),
        waiting=len(unused) - len(fitting),
    )


def _form(session: Session, artifacts: ArtifactStore, name: AdapterName, unused: Sequence[UnusedFeedback]) -> Form:
    """The form of the adapter's other supervised data; without such data, that of the oldest feedback."""
    for file in nightly.next_training_files(session, name):
        with artifacts.open(file.artifact, DATA_FILE) as content:
            found = _first_format(content)
        if found is not None and found[0] == "supervised":
            return "messages" if found[1] else "prompt"
    return form_of(unused[0]) if unused else "messages"


def _first_format(content: BinaryIO) -> tuple[DataKind, bool] | None:
    """The format of the first valid row; files of sources may have others, which collection quarantines."""
    for _, row in iter_rows(content):
        with suppress(LineError):
            return row_format(row)
    return None


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
