"""Asks questions about adapters for a run; an answer is stored as it arrives, so that none is asked twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from loramill.errors import LoramillError
from loramill.pipelines.nightly.context import NightlyContext, NightlyProgress
from loramill.pipelines.nightly.questions import EvalAnswer, EvalQuestion
from loramill.registry import nightly_answers


def answer_once(
    context: NightlyContext, stage: str, questions: Sequence[tuple[str, EvalQuestion]]
) -> list[EvalAnswer | LoramillError]:
    """Returns the answers to questions, each with its adapter's name; those of all adapters share the engine's batches.

    Answers that the run has kept are not asked for again; `nightly_answers.forget` ends that.

    Raises:
        NotRunning, Unavailable: the gateway does not answer any more.
        LeaseLost: another process has taken the run over.
    """
    keys = [(adapter, question_digest(question)) for adapter, question in questions]
    with context.registry.reading() as session:
        kept = nightly_answers.list_answers(session, context.run.id)
    missing = [index for index, key in enumerate(keys) if key not in kept]

    def report(done: int) -> None:
        finished = len(questions) - len(missing) + done
        context.progress(NightlyProgress(stage, None, finished, len(questions), "answers"))

    def keep(index: int, answer: EvalAnswer) -> None:
        adapter, question = keys[missing[index]]
        with context.registry.writing() as session:
            context.check_lease(session)
            nightly_answers.keep(session, context.run.id, adapter, question, answer.text, truncated=answer.truncated)

    report(0)
    pending = [questions[index][1] for index in missing]
    new = dict(zip(missing, context.gateway.answer_all(pending, report, keep) if pending else [], strict=True))
    return [new[index] if index in new else EvalAnswer(*kept[key]) for index, key in enumerate(keys)]


def question_digest(question: EvalQuestion) -> str:
    """A hash of the model's name and of what it is asked."""
    content = [question.model, question.messages, question.prompt, question.max_tokens, question.tools]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
