"""The evaluation stage: base, previous, champion and challenger of every adapter on its held-out slices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from loramill.data.examples import Example, read_examples
from loramill.data.tokenizer import ChatTokenizer
from loramill.errors import LoramillError, NotFound
from loramill.names import AdapterName
from loramill.pipelines.nightly.context import TRANSIENT_ERRORS, NightlyContext, NightlyProgress
from loramill.pipelines.nightly.evaluation.results import example_digest, example_results
from loramill.pipelines.nightly.questions import EvalAnswer, EvalQuestion, build_questions
from loramill.pipelines.nightly.scoring import Score, mean_score
from loramill.registry import adapters, datasets, evaluations
from loramill.types import Candidate, ExampleResult


@dataclass(frozen=True, slots=True)
class EvalCell:
    """One slice of held-out examples, for one candidate.

    Attributes:
        model: the candidate's name in the API.
        version: the candidate's version; None for the base.
    """

    slice: str
    dataset: str
    role: Candidate
    model: str
    version: str | None
    examples: tuple[Example, ...]


#: Questions and answers by adapter, slice and role.
Key = tuple[str, str, str]
Answers = Mapping[Key, Sequence[EvalAnswer | LoramillError]]


def evaluate_all(context: NightlyContext) -> None:
    """Scores the candidates of every adapter on its held-out slices, all questions mixed.

    Raises:
        NotRunning, Unavailable: the gateway is unreachable.
    """
    cells: dict[str, list[EvalCell]] = {}

    def prepare(adapter: str) -> None:
        cells[adapter] = list_cells(context, adapter)

    for adapter in context.remaining("evaluate"):
        context.attempt(adapter, "evaluate", partial(prepare, adapter))
    if not cells:
        return
    tokenizer = ChatTokenizer.load(context.base.folder)
    answers = _answer(
        context,
        {
            (adapter, cell.slice, cell.role): build_questions(cell.model, cell.examples, tokenizer)
            for adapter, each in cells.items()
            for cell in each
        },
    )
    for adapter, each in cells.items():
        context.attempt(adapter, "evaluate", partial(_record, context, adapter, each, answers))


def _answer(context: NightlyContext, questions: Mapping[Key, Sequence[EvalQuestion]]) -> Answers:
    """Sends the questions of all adapters together, so that they share the engine's batches."""
    flat = [(key, question) for key, each in questions.items() for question in each]

    def report(done: int) -> None:
        context.progress(NightlyProgress("evaluate", None, done, len(flat), "answers"))

    report(0)
    answers: dict[Key, list[EvalAnswer | LoramillError]] = {key: [] for key in questions}
    if flat:
        found = context.gateway.answer_all([question for _, question in flat], report)
        for (key, _), answer in zip(flat, found, strict=True):
            answers[key].append(answer)
    return answers


def list_cells(context: NightlyContext, adapter: str) -> list[EvalCell]:
    """Every slice of an adapter's held-out examples for each of its candidates.

    Raises:
        NotFound: the adapter, a version or a slice was deleted.
    """
    plan, trained = context.done("collect")[adapter], context.done("train")[adapter]
    versions = _versions(context, plan, trained["version"])
    name = AdapterName.parse(adapter)
    return [
        EvalCell(slice_, dataset, role, name.at(version) if version else context.base.name, version, examples)
        for slice_, dataset in plan["slices"].items()
        for examples in [load_examples(context, dataset)]
        for role, version in versions.items()
    ]


def _versions(context: NightlyContext, plan: Mapping[str, Any], challenger: str) -> dict[Candidate, str | None]:
    """The candidates' versions; there is no champion before the first promotion, and none before the first champion."""
    versions: dict[Candidate, str | None] = {"base": None}
    if previous := plan.get("previous"):
        with context.registry.reading() as session, suppress(NotFound):  # deleted since
            versions["previous"] = adapters.get_version(session, previous).id
    if plan["champion"]:
        versions["champion"] = plan["champion"]
    return {**versions, "challenger": challenger}


def _record(context: NightlyContext, adapter: str, cells: Sequence[EvalCell], answers: Answers) -> None:
    """Records an adapter's scores.

    Where answers are missing for the first time and for a transient reason, the step stays pending with that reason,
    and the next run asks again; else the reason is raised.
    """
    by_cell = [(cell, answers[adapter, cell.slice, cell.role]) for cell in cells]
    errors = [answer for _, each in by_cell for answer in each if isinstance(answer, LoramillError)]
    if errors:
        retried = "error" in context.in_progress("evaluate").get(adapter, {})
        if retried or not isinstance(errors[0], TRANSIENT_ERRORS):
            raise errors[0]
        with context.registry.writing() as session:
            context.report(context.record_pending(session, adapter, "evaluate", {"error": errors[0].message}))
        return
    results = _results(by_cell)
    # Stored before the transaction that refers to it: a run that is killed in between stores the same artifact again.
    artifact = evaluations.store_results(context.registry.artifacts, list(results.values()))
    slices: dict[str, dict[str, dict[str, Any]]] = {}
    with context.registry.writing() as session:
        for cell, _ in by_cell:
            mean = _mean(cell, results)
            slices.setdefault(cell.slice, {})[cell.role] = asdict(mean)
            evaluations.add(
                session,
                adapter,
                version=cell.version,
                dataset=cell.dataset,
                slice=cell.slice,
                examples=mean.examples,
                metrics={"exact_match": mean.exact_match, "token_f1": mean.token_f1},
                results=artifact,
            )
        context.finish(session, adapter, "evaluate", {"slices": slices, "results": artifact})


def _results(
    by_cell: Sequence[tuple[EvalCell, Sequence[EvalAnswer | LoramillError]]],
) -> dict[tuple[Candidate, str], ExampleResult]:
    """The results by candidate and example."""
    found: dict[tuple[Candidate, str], ExampleResult] = {}
    for role in dict.fromkeys(cell.role for cell, _ in by_cell):
        own = [(cell, each) for cell, each in by_cell if cell.role == role]
        examples = {cell.slice: cell.examples for cell, _ in own}
        answers = {cell.slice: [answer for answer in each if isinstance(answer, EvalAnswer)] for cell, each in own}
        for result in example_results(role, own[0][0].version, examples, answers):
            found[role, result.example] = result
    return found


def _mean(cell: EvalCell, results: Mapping[tuple[Candidate, str], ExampleResult]) -> Score:
    return mean_score([results[cell.role, example_digest(each)].scores for each in cell.examples])


def load_examples(context: NightlyContext, dataset: str) -> tuple[Example, ...]:
    """Reads the examples of a dataset."""
    with context.registry.reading() as session:
        found = datasets.get(session, dataset)
    return read_examples(context.registry.artifacts.read(found.artifact, "data.jsonl"), found.filename).examples
