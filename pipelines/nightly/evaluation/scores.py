"""Scores of the answers of all candidates to some examples, by the metrics that a definition chooses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from loramill.pipelines.nightly.evaluation.items import AnsweredExample
from loramill.pipelines.nightly.evaluation.judge import judge
from loramill.pipelines.nightly.evaluation.plan import EvalPlan
from loramill.pipelines.nightly.evaluation.results import GOLDEN_SLICE, HeldOutExample, golden_metric
from loramill.pipelines.nightly.evaluation.scorer import score_with
from loramill.pipelines.nightly.questions import EvalAnswer
from loramill.pipelines.nightly.text_metrics import score_example
from loramill.types import Candidate, ExampleResult

#: Answers by candidate and whether they are losses instead, in the order of the examples.
ChunkAnswers = Mapping[tuple[Candidate, bool], Sequence[EvalAnswer]]


def needs_answers(plan: EvalPlan) -> bool:
    """Whether answers are generated; the loss alone needs none."""
    return set(plan.definition.computed_metrics) != {"loss"} or plan.definition.golden is not None


def score_chunk(plan: EvalPlan, examples: Sequence[HeldOutExample], answers: ChunkAnswers) -> list[ExampleResult]:
    """The results of all candidates on some examples.

    Raises:
        EvaluationError, SettingsInvalid, Unavailable: the scorer or the judge fails.
    """
    pairs = [(candidate, index) for candidate in plan.candidates for index in range(len(examples))]
    texts = [_answer(answers, candidate.role, index) for candidate, index in pairs]
    custom = _custom_scores(
        plan,
        [AnsweredExample(examples[index].example, text.text) for (_, index), text in zip(pairs, texts, strict=True)],
    )
    found = []
    for number, ((candidate, index), answer) in enumerate(zip(pairs, texts, strict=True)):
        held = examples[index]
        scores = score_example(answer.text, held.example.completion, _text_metrics(plan, held))
        scores |= {metric: each[number] for metric, each in custom.items()}
        if "loss" in plan.definition.computed_metrics:
            loss = answers[candidate.role, True][index].loss
            assert loss is not None  # the question asked for it
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


def _answer(answers: ChunkAnswers, role: Candidate, index: int) -> EvalAnswer:
    """The answer to an example; an empty one if none was generated."""
    return answers[role, False][index] if (role, False) in answers else EvalAnswer("")


def _text_metrics(plan: EvalPlan, held: HeldOutExample) -> Sequence[str]:
    metrics = plan.definition.computed_metrics
    return (*metrics, golden_metric(plan.gate.metric)) if GOLDEN_SLICE in held.slices else metrics


def _custom_scores(plan: EvalPlan, answered: Sequence[AnsweredExample]) -> dict[str, list[float]]:
    definition, found = plan.definition, dict[str, list[float]]()
    if "scorer" in definition.computed_metrics and definition.scorer is not None:
        found["scorer"] = score_with(definition.scorer, answered, definition.scorer_time_limit)
    if "judge" in definition.computed_metrics and definition.judge is not None:
        found["judge"] = judge(definition.judge, answered)
    return found
