"""The evaluation stage: base, previous, champion and challenger of every adapter on the same held-out examples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

from loramill.data.tokenizer import ChatTokenizer
from loramill.errors import LoramillError
from loramill.pipelines.nightly.context import TRANSIENT_ERRORS, NightlyContext, NightlyProgress
from loramill.pipelines.nightly.evaluation.plan import EvalPlan, plan_evaluation
from loramill.pipelines.nightly.evaluation.results import mean_scores
from loramill.pipelines.nightly.questions import EvalAnswer, EvalQuestion, build_loss_questions, build_questions
from loramill.pipelines.nightly.scoring import score_example
from loramill.registry import evaluations
from loramill.types import Candidate, ExampleResult

#: Answers by candidate, and whether they are losses instead, in the order of the examples.
Answers = Mapping[tuple[Candidate, bool], Sequence[EvalAnswer | LoramillError]]


def evaluate_all(context: NightlyContext) -> None:
    """Scores the candidates of every adapter on its held-out examples, the questions of all adapters mixed.

    Raises:
        NotRunning, Unavailable: the gateway is unreachable.
    """
    plans: dict[str, EvalPlan] = {}

    def prepare(adapter: str) -> None:
        plans[adapter] = plan_evaluation(context, adapter)

    for adapter in context.remaining("evaluate"):
        context.attempt(adapter, "evaluate", partial(prepare, adapter))
    if not plans:
        return
    for adapter, answers in _ask(context, plans).items():
        context.attempt(adapter, "evaluate", partial(_record, context, plans[adapter], answers))


def _ask(context: NightlyContext, plans: Mapping[str, EvalPlan]) -> dict[str, Answers]:
    """Sends the questions of all adapters together, so that they share the engine's batches."""
    tokenizer = ChatTokenizer.load(context.base.folder)
    questions: dict[str, dict[tuple[Candidate, bool], list[EvalQuestion]]] = {}

    def build(adapter: str) -> None:
        questions[adapter] = dict(_questions(plans[adapter], tokenizer))

    for adapter in plans:
        context.attempt(adapter, "evaluate", partial(build, adapter))
    flat = [each for by_kind in questions.values() for kind in by_kind.values() for each in kind]

    def report(done: int) -> None:
        context.progress(NightlyProgress("evaluate", None, done, len(flat), "answers"))

    report(0)
    found = iter(context.gateway.answer_all(flat, report) if flat else ())
    return {
        adapter: {kind: [next(found) for _ in each] for kind, each in by_kind.items()}
        for adapter, by_kind in questions.items()
    }


def _questions(plan: EvalPlan, tokenizer: ChatTokenizer) -> Iterator[tuple[tuple[Candidate, bool], list[EvalQuestion]]]:
    examples = [each.example for each in plan.examples]
    for candidate in plan.candidates:
        if set(plan.metrics) != {"loss"}:
            yield (candidate.role, False), build_questions(candidate.model, examples, tokenizer)
        if "loss" in plan.metrics:
            yield (candidate.role, True), build_loss_questions(candidate.model, examples, tokenizer)


def _record(context: NightlyContext, plan: EvalPlan, answers: Answers) -> None:
    """Records an adapter's scores.

    Where answers are missing for the first time and for a transient reason, the step stays pending with that reason,
    and the next run asks again; else the reason is raised.
    """
    every = [each for by_kind in answers.values() for each in by_kind]
    errors = [each for each in every if isinstance(each, LoramillError)]
    if errors:
        retried = "error" in context.in_progress("evaluate").get(plan.adapter, {})
        if retried or not isinstance(errors[0], TRANSIENT_ERRORS):
            raise errors[0]
        with context.registry.writing() as session:
            context.report(context.record_pending(session, plan.adapter, "evaluate", {"error": errors[0].message}))
        return
    results = _results(plan, answers)
    # Stored before the transaction that refers to it: a run that is killed in between stores the same artifact again.
    artifact = evaluations.store_results(context.registry.artifacts, results)
    slices = mean_scores(results)
    versions = {each.role: each.version for each in plan.candidates}
    tokens = sum(each.tokens for each in every if isinstance(each, EvalAnswer))
    with context.registry.writing() as session:
        for name, by_candidate in slices.items():
            for role, means in by_candidate.items():
                evaluations.add(
                    session,
                    plan.adapter,
                    version=versions[role],
                    dataset=plan.datasets[name],
                    slice=name,
                    examples=int(means["examples"]),
                    metrics={metric: mean for metric, mean in means.items() if metric != "examples"},
                    results=artifact,
                )
        metric = context.definition.for_adapter(plan.adapter).gate.metric
        cost = {"answers": len(every), "tokens_answered": tokens}
        context.finish(
            session, plan.adapter, "evaluate", {"slices": slices, "results": artifact, "metric": metric} | cost
        )


def _results(plan: EvalPlan, answers: Answers) -> list[ExampleResult]:
    """The results of all candidates, each example once."""
    found = []
    for candidate in plan.candidates:
        texts, losses = (list(answers.get((candidate.role, loss), ())) for loss in (False, True))
        for index, held in enumerate(plan.examples):
            answer = _answer(texts, index)
            scores = score_example(answer.text, held.example.completion, plan.metrics)
            if (loss := _answer(losses, index).loss) is not None:
                scores["loss"] = loss
            found.append(
                ExampleResult(
                    example=held.digest,
                    candidate=candidate.role,
                    version=candidate.version,
                    scores=scores,
                    answer=answer.text,
                    truncated=answer.truncated,
                    slices=held.slices,
                )
            )
    return found


def _answer(answers: Sequence[EvalAnswer | LoramillError], index: int) -> EvalAnswer:
    """The answer to a question; an empty one if it was not asked."""
    found = answers[index] if answers else EvalAnswer("")
    assert isinstance(found, EvalAnswer)
    return found
