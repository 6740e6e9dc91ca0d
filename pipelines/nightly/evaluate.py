"""The evaluation stage: base, previous, champion and challenger of every adapter on the same held-out examples.

All adapters are asked in rounds, a chunk of examples of each, and leave once their decision is certain.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

from loramill.data.tokenizer import ChatTokenizer
from loramill.errors import LoramillError
from loramill.pipelines.nightly.context import TRANSIENT_ERRORS, NightlyContext, NightlyProgress
from loramill.pipelines.nightly.evaluation.plan import EvalPlan, plan_evaluation
from loramill.pipelines.nightly.evaluation.progress import Evaluation
from loramill.pipelines.nightly.evaluation.results import mean_scores
from loramill.pipelines.nightly.evaluation.scores import needs_answers, score_chunk
from loramill.pipelines.nightly.questions import EvalAnswer, EvalQuestion, build_loss_questions, build_questions
from loramill.registry import evaluations
from loramill.types import Candidate

#: A candidate, and whether its losses are asked for instead of answers.
_Kind = tuple[Candidate, bool]


@dataclass(frozen=True, slots=True)
class _Round:
    """The questions and answers of an adapter in one round, by kind."""

    questions: dict[_Kind, list[EvalQuestion]]
    answers: dict[_Kind, list[EvalAnswer | LoramillError]]


def evaluate_all(context: NightlyContext) -> None:
    """Scores the candidates of every adapter on its held-out examples, the questions of all adapters mixed.

    Raises:
        NotRunning, Unavailable: the gateway is unreachable.
    """
    evaluated: dict[str, Evaluation] = {}

    def prepare(adapter: str) -> None:
        evaluated[adapter] = Evaluation(plan_evaluation(context, adapter))

    for adapter in context.remaining("evaluate"):
        _attempt(context, adapter, partial(prepare, adapter))
    if not evaluated:
        return
    tokenizer = ChatTokenizer.load(context.base.folder)
    done = 0
    while evaluated:
        rounds = _ask(context, evaluated, tokenizer, done)
        for adapter in list(evaluated):
            evaluation, sent = evaluated[adapter], rounds.get(adapter)
            taken = sent is not None and _attempt(context, adapter, partial(_take, context, evaluation, sent))
            if not taken or evaluation.ended:
                del evaluated[adapter]
        done += sum(len(each) for one in rounds.values() for each in one.questions.values())


def _attempt(context: NightlyContext, adapter: str, work: partial[None]) -> bool:
    """Does a step's work. Returns whether it succeeded.

    If it fails for the first time and for a transient reason, the step stays pending with that reason, and the next run
    asks again.
    """
    waits = False

    def work_or_wait() -> None:
        nonlocal waits
        try:
            work()
        except TRANSIENT_ERRORS as error:
            if "error" in context.in_progress("evaluate").get(adapter, {}):
                raise
            waits, reason = True, error.message if isinstance(error, LoramillError) else str(error)
            with context.registry.writing() as session:
                context.report(context.record_pending(session, adapter, "evaluate", {"error": reason}))

    return context.attempt(adapter, "evaluate", work_or_wait) and not waits


def _ask(
    context: NightlyContext, evaluated: dict[str, Evaluation], tokenizer: ChatTokenizer, done: int
) -> dict[str, _Round]:
    """Sends the next questions of all adapters together, so that they share the engine's batches."""
    questions: dict[str, dict[_Kind, list[EvalQuestion]]] = {}

    def build(adapter: str) -> None:
        questions[adapter] = dict(_questions(evaluated[adapter], tokenizer))

    for adapter in evaluated:
        context.attempt(adapter, "evaluate", partial(build, adapter))
    flat = [each for by_kind in questions.values() for kind in by_kind.values() for each in kind]
    later = sum(
        (len(each.plan.examples) - each.finished - len(each.next_chunk())) * _per_example(each.plan)
        for each in evaluated.values()
    )

    def report(answered: int) -> None:
        total = done + len(flat) + later
        context.progress(NightlyProgress("evaluate", None, done + answered, total, "answers"))

    report(0)
    found = iter(context.gateway.answer_all(flat, report) if flat else ())
    return {
        adapter: _Round(by_kind, {kind: [next(found) for _ in each] for kind, each in by_kind.items()})
        for adapter, by_kind in questions.items()
    }


def _per_example(plan: EvalPlan) -> int:
    kinds = needs_answers(plan) + ("loss" in plan.definition.computed_metrics)
    return kinds * len(plan.candidates)


def _questions(evaluation: Evaluation, tokenizer: ChatTokenizer) -> Iterator[tuple[_Kind, list[EvalQuestion]]]:
    plan, examples = evaluation.plan, [each.example for each in evaluation.next_chunk()]
    first, pending = plan.candidates[0].model, dict[bool, list[EvalQuestion]]()
    if needs_answers(plan):
        pending[False] = build_questions(first, examples, tokenizer)
    if "loss" in plan.definition.computed_metrics:
        pending[True] = build_loss_questions(first, examples, tokenizer)
    for candidate in plan.candidates:
        for is_loss, questions in pending.items():
            yield (candidate.role, is_loss), [replace(each, model=candidate.model) for each in questions]


def _take(context: NightlyContext, evaluation: Evaluation, sent: _Round) -> None:
    """Scores the answers of a round, and records the evaluation once it has ended.

    Raises:
        LoramillError: an answer is missing, or the scorer or the judge fails.
    """
    answers = {kind: [_answered(each) for each in found] for kind, found in sent.answers.items()}
    evaluation.add(score_chunk(evaluation.plan, evaluation.next_chunk(), answers))
    evaluation.answers += sum(map(len, answers.values()))
    evaluation.tokens += sum(each.tokens for found in answers.values() for each in found)
    if evaluation.ended:
        _record(context, evaluation)


def _answered(answer: EvalAnswer | LoramillError) -> EvalAnswer:
    if isinstance(answer, LoramillError):
        raise answer
    return answer


def _record(context: NightlyContext, evaluation: Evaluation) -> None:
    plan, left = evaluation.plan, evaluation.left
    # Stored before the transaction that refers to it: a run that is killed in between stores the same artifact again.
    artifact = evaluations.store_results(context.registry.artifacts, evaluation.results, left)
    slices = mean_scores(evaluation.results)
    versions = {each.role: each.version for each in plan.candidates}
    with context.registry.writing() as session:
        for name, by_candidate in slices.items():
            for role, means in by_candidate.items():
                evaluations.add(
                    session,
                    plan.adapter,
                    version=versions[role],
                    dataset=plan.dataset(name),
                    slice=name,
                    examples=int(means["examples"]),
                    metrics={metric: mean for metric, mean in means.items() if metric != "examples"},
                    results=artifact,
                )
        result = {
            "slices": slices,
            "results": artifact,
            "metric": plan.gate.metric,
            "examples": evaluation.finished,
            "examples_left": len(plan.examples) - evaluation.finished,
            "answers": evaluation.answers,
            "tokens_answered": evaluation.tokens,
        }
        context.finish(session, plan.adapter, "evaluate", result)
