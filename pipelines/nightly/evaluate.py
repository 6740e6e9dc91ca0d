"""The evaluation stage: base, champion and challenger of every adapter on its held-out slices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from loramill.data.examples import Example, read_examples
from loramill.data.tokenizer import ChatTokenizer
from loramill.errors import LoramillError
from loramill.names import AdapterName
from loramill.pipelines.nightly.context import TRANSIENT_ERRORS, NightlyContext, NightlyProgress
from loramill.pipelines.nightly.questions import EvalAnswer, EvalQuestion, build_questions
from loramill.pipelines.nightly.scoring import Score, score
from loramill.registry import datasets, evaluations


@dataclass(frozen=True, slots=True)
class EvalCell:
    """One slice of held-out examples, for one candidate.

    Attributes:
        role: "base", "champion" or "challenger".
        model: the candidate's name in the API.
        version: the candidate's version; None for the base.
    """

    slice: str
    dataset: str
    role: str
    model: str
    version: str | None
    examples: tuple[Example, ...]


#: Questions and answers by adapter, slice and role.
Key = tuple[str, str, str]
Answers = Mapping[Key, Sequence[EvalAnswer | LoramillError]]


def evaluate_all(context: NightlyContext) -> None:
    """Scores base, champion and challenger of every adapter on its held-out slices, all questions mixed.

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
    """Every slice of an adapter's held-out examples for its base, champion and challenger.

    Raises:
        NotFound: the adapter, a version or a slice was deleted.
    """
    plan, trained = context.done("collect")[adapter], context.done("train")[adapter]
    versions = {"base": None, "champion": plan["champion"], "challenger": trained["version"]}
    models = model_names(context, adapter, plan["champion"], trained["version"])
    return [
        EvalCell(slice_, dataset, role, model, versions[role], examples)
        for slice_, dataset in plan["slices"].items()
        for examples in [load_examples(context, dataset)]
        for role, model in models.items()
    ]


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
    scores: dict[str, dict[str, dict[str, Any]]] = {}
    with context.registry.writing() as session:
        for cell, each in by_cell:
            result = _score(cell, each)
            scores.setdefault(cell.slice, {})[cell.role] = asdict(result)
            evaluations.add(
                session,
                adapter,
                version=cell.version,
                dataset=cell.dataset,
                slice=cell.slice,
                examples=result.examples,
                metrics={"exact_match": result.exact_match, "token_f1": result.token_f1},
            )
        context.finish(session, adapter, "evaluate", scores)


def _score(cell: EvalCell, answers: Sequence[EvalAnswer | LoramillError]) -> Score:
    texts = [answer.text for answer in answers if isinstance(answer, EvalAnswer)]
    return score(texts, [example.completion for example in cell.examples])


def model_names(context: NightlyContext, adapter: str, champion: str | None, challenger: str) -> dict[str, str]:
    """Model names in the API by role; there is no champion before the first promotion."""
    name = AdapterName.parse(adapter)
    names = {"base": context.base.name, "challenger": name.at(challenger)}
    return names | ({"champion": name.at(champion)} if champion else {})


def load_examples(context: NightlyContext, dataset: str) -> tuple[Example, ...]:
    """Reads the examples of a dataset."""
    with context.registry.reading() as session:
        found = datasets.get(session, dataset)
    return read_examples(context.registry.artifacts.read(found.artifact, "data.jsonl"), found.filename).examples
