"""The champions of a run answer old prompts together, and what scores joins the collected training data."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from sqlalchemy.orm import Session

from loramill.data.examples import read_row
from loramill.data.tokenizer import ChatTokenizer
from loramill.errors import LoramillError
from loramill.names import AdapterName
from loramill.pipelines.nightly.answers import answer_once
from loramill.pipelines.nightly.collection.fingerprint import fingerprints
from loramill.pipelines.nightly.collection.freeze import freeze_rows
from loramill.pipelines.nightly.collection.next_job import with_training_file
from loramill.pipelines.nightly.collection.past import (
    find_past,
    known_content,
    known_division,
    old_rows,
    originals,
    read_rows,
)
from loramill.pipelines.nightly.collection.policy import near_held_out
from loramill.pipelines.nightly.collection.relation import Known
from loramill.pipelines.nightly.context import NightlyContext
from loramill.pipelines.nightly.questions import EvalAnswer, EvalQuestion, build_questions
from loramill.pipelines.nightly.replay.policy import choose_prompts, on_policy_count, select_answers
from loramill.registry import content, datasets, nightly, nightly_answers
from loramill.types import ContentSide, JobSpec, StepStatus

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Prompts:
    """The old rows of an adapter that its champion answers; `count` examples are wanted.

    Attributes:
        plan: the result of the collection.
    """

    plan: Mapping[str, Any]
    count: int
    rows: tuple[bytes, ...]
    questions: tuple[EvalQuestion, ...]


def replay_all(context: NightlyContext) -> None:
    """Adds on-policy examples to the training data of every adapter that has a champion, and has not begun to train.

    The result of the collection then says how many there are. An answer that does not come is one example less.

    Raises:
        NotRunning, Unavailable: the gateway does not answer; the answers that have come are kept.
    """
    tokenizer: ChatTokenizer | None = None
    prompts: dict[str, _Prompts] = {}

    def prepare(adapter: str, plan: Mapping[str, Any], tokenizer: ChatTokenizer) -> None:
        prompts[adapter] = _choose(context, adapter, plan, tokenizer)

    for adapter, plan in _waiting(context).items():
        tokenizer = tokenizer or ChatTokenizer.load(context.base.folder)
        context.attempt(adapter, "train", partial(prepare, adapter, plan, tokenizer))
    if not prompts:
        return
    questions = [(adapter, question) for adapter, each in prompts.items() for question in each.questions]
    answers = iter(answer_once(context, "replay", questions))
    for adapter, each in prompts.items():
        own = [next(answers) for _ in each.questions]
        context.attempt(adapter, "train", partial(_add, context, adapter, each, own))
    with context.registry.writing() as session:
        context.check_lease(session)
        nightly_answers.forget(session, context.run.id)


def _waiting(context: NightlyContext) -> dict[str, Mapping[str, Any]]:
    """What was collected of the adapters that are to be trained from a champion, and have no on-policy examples yet."""
    begun, plans = context.in_progress("train"), context.done("collect")
    return {
        adapter: plans[adapter]
        for adapter in context.remaining("train")
        if not {"job", "waiting"} & begun.get(adapter, {}).keys()
        and plans[adapter]["spec"]["start_from"]
        and plans[adapter]["spec"]["objective"] == "sft"
        and "on_policy" not in plans[adapter].get("replay", {})
        and context.definition.for_adapter(adapter).replay.on_policy > 0
    }


def _choose(context: NightlyContext, adapter: str, plan: Mapping[str, Any], tokenizer: ChatTokenizer) -> _Prompts:
    name = AdapterName.parse(adapter)
    definition = context.definition.for_adapter(adapter)
    artifacts = context.registry.artifacts
    with context.registry.reading() as session:
        past = find_past(session, name, context.base)
        if past.champion != plan["champion"]:  # it moved since the data was collected, and the gate will hold
            return _Prompts(plan, 0, (), ())
        trained = read_rows(session, artifacts, plan["spec"]["train"])
        count = on_policy_count(len(trained), definition.replay.on_policy)
        old, known = old_rows(session, artifacts, past), known_content(session, name)
        division = known_division(session, artifacts, past, known, old, definition.split)
        original = originals(known)

        def usable(row: bytes) -> bool:
            return original(row) and not (division is not None and division.holds_out(read_row(row, 1).metadata))

        rows = choose_prompts(old, set(trained), count, seed=plan["champion"], usable=usable)
        rows = _not_held_out(known, rows, definition.split.near_duplicate)
    examples = [read_row(row, line) for line, row in enumerate(rows, 1)]
    return _Prompts(plan, count, tuple(rows), tuple(build_questions(name.at(plan["champion"]), examples, tokenizer)))


def _add(
    context: NightlyContext, adapter: str, prompts: _Prompts, answers: Sequence[EvalAnswer | LoramillError]
) -> None:
    """Freezes the data with the on-policy examples, and records it in place of what was collected."""
    plan, name = prompts.plan, AdapterName.parse(adapter)
    definition = context.definition.for_adapter(adapter)
    errors = [each for each in answers if isinstance(each, LoramillError)]
    if errors:
        log.warning("%d old prompts of %s were not answered: %s", len(errors), adapter, errors[0].message)
    own = [None if isinstance(each, LoramillError) else each for each in answers]
    rows = select_answers(prompts.rows, own, prompts.count, definition.replay.min_score)
    with context.registry.writing() as session:
        context.check_lease(session)
        rows = _not_held_out(known_content(session, name, ContentSide.HELD_OUT), rows, definition.split.near_duplicate)
        counts = {"prompts": len(prompts.rows), "unanswered": len(errors), "on_policy": len(rows)}
        replay = plan.get("replay", {}) | counts
        changed = {**plan, "spec": _extended(context, session, name, plan["spec"], rows), "replay": replay}
        nightly.record_step(session, context.run.id, adapter, "collect", StepStatus.DONE, changed)


def _extended(
    context: NightlyContext, session: Session, name: AdapterName, spec: dict[str, Any], rows: Sequence[bytes]
) -> dict[str, Any]:
    """The job's spec with a training file to which rows were added; the file without them is deleted."""
    if not rows:
        return spec
    artifacts, old = context.registry.artifacts, spec["train"]
    trained = read_rows(session, artifacts, old)
    filename = datasets.get(session, old).filename
    frozen = freeze_rows(session, artifacts, name.tenant, filename, [*trained, *rows])
    content.move(session, name, old, frozen.id)
    datasets.delete(session, old)
    return with_training_file(JobSpec.model_validate(spec), frozen).model_dump(mode="json")


def _not_held_out(known: Known, rows: Sequence[bytes], threshold: float | None) -> list[bytes]:
    """The rows that neither equal nor resemble a held-out example."""
    held = [each for each, side in zip(known.examples, known.sides, strict=True) if side is ContentSide.HELD_OUT]
    examples = [read_row(row, line) for line, row in enumerate(rows, 1)]
    leaked = near_held_out(fingerprints(examples), held, threshold)
    return [row for row, out in zip(rows, leaked, strict=True) if not out]
