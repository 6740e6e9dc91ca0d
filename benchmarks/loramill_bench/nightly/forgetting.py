"""Forgetting over nightly runs: what five runs with a new slice of labels each leave of the first slice.

Every tenant has an adapter per kind of replay, which all runs retrain together: real training, real answers, and the
pipeline's own collection, replay and promotion. The gate promotes every version that is not worse than the base: the
measurement is of training, not of the gate. In the last run two adapters are trained for comparison: one on the newest
slice alone, and one on all slices together. The latter forgets nothing, but chooses among all labels, which is harder
than choosing among those of the first slice: what it loses, no replay can keep.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from loramill.data.examples import Example, read_examples
from loramill.data.jsonl import iter_rows
from loramill.data.tokenizer import ChatTokenizer
from loramill.errors import InvalidRequest, LoramillError
from loramill.models.catalog import Base
from loramill.names import AdapterName
from loramill.pipelines.nightly.definition import NightlyDefinition
from loramill.pipelines.nightly.questions import EvalQuestion, build_questions
from loramill.pipelines.nightly.run import run_nightly
from loramill.pipelines.nightly.text_metrics import normalized
from loramill.registry import Registry, adapters
from loramill_bench.nightly.local_pool import TENANT, LocalPool, add_data, scratch_registry
from loramill_bench.results import Result

#: Tenants whose answers are labels.
TENANTS = (
    "clinc-banking",
    "clinc-travel",
    "clinc-credit-cards",
    "clinc-kitchen-dining",
    "clinc-auto-commute",
    "clinc-utility",
)
RUNS = 5
#: Most that the first slice may lose, and that the newest may be below a model trained on it alone: exact match.
MAX_LOSS = 0.03
#: Kinds of replay, and what nightly.yaml says for each.
REPLAY: Mapping[str, Mapping[str, object]] = {
    "none": {"plain_examples": 0, "on_policy": 0.0},
    "plain": {"on_policy": 0.0},
    "on-policy": {},
}
#: Adapters of the last run: on the newest slice, and on all slices.
ALONE, TOGETHER = "alone", "together"


@dataclass(frozen=True, slots=True)
class Slice:
    """The examples of some of a tenant's labels: rows to train on, and test examples."""

    train: tuple[bytes, ...]
    test: tuple[Example, ...]


def results(
    base: Base,
    folder: Path,
    report: Callable[[str], object],
    *,
    names: Sequence[str] = TENANTS,
    examples: int | None = None,
) -> list[Result]:
    """Exact match of the first and of the newest slice, over the test examples of all tenants together.

    One tenant with 48 examples per slice takes a quarter of an hour of CPU time.

    Args:
        base: the base.
        folder: contains a folder per tenant with train.jsonl and test.jsonl.
        report: called with the name of each run before it begins.
        names: the tenants.
        examples: training examples per slice; None: all.

    Raises:
        InvalidRequest: a tenant's file is missing, or it has fewer labels than there are runs.
    """
    torch.set_num_threads(1)
    slices = {name: read_slices(folder / name, RUNS, examples) for name in names}
    with scratch_registry() as (registry, settings):
        pool = LocalPool(base, registry, settings)
        for number in range(RUNS):
            report(f"forgetting, run {number + 1} of {RUNS}")
            for name, parts in slices.items():
                rows: dict[str, Sequence[bytes]] = dict.fromkeys(REPLAY, parts[number].train)
                if number == RUNS - 1:
                    rows |= {ALONE: parts[number].train, TOGETHER: [row for each in parts for row in each.train]}
                for kind, own in rows.items():
                    add_data(registry, _name(kind, name), own)
            run_nightly(registry, settings, gateway=pool, definition=definition())
            if number == 0:
                before = {kind: _exact_match(base, registry, pool, kind, slices, 0) for kind in REPLAY}
        after = {kind: _exact_match(base, registry, pool, kind, slices, 0) for kind in (*REPLAY, TOGETHER)}
        newest = {kind: _exact_match(base, registry, pool, kind, slices, RUNS - 1) for kind in (*REPLAY, ALONE)}
    return list(_rows(f"forgetting, {len(names)} tenants", before, after, newest))


def definition() -> NightlyDefinition:
    """The nightly.yaml of the runs: each kind of replay by the names of its adapters, and a gate that lets all pass."""
    return NightlyDefinition.model_validate(
        {
            "gate": {"metric": "exact_match", "confidence": 0.5, "max_loss": 1.0},
            "overrides": [
                {"adapters": [f"{TENANT}/{kind}-*"], "replay": dict(values)} for kind, values in REPLAY.items()
            ],
        }
    )


def read_slices(folder: Path, count: int, examples: int | None = None) -> list[Slice]:
    """Divides a tenant's labels, in alphabetical order, among `count` slices.

    Raises:
        InvalidRequest: a file is missing, or there are fewer labels than slices.
    """
    try:
        train, test = ((folder / f"{name}.jsonl").read_bytes() for name in ("train", "test"))
    except FileNotFoundError as error:
        raise InvalidRequest(f"{error.filename} is missing: name the folder that has it.", param="tenants") from error
    rows = [row for _, row in iter_rows(train)]
    known = read_examples(train, "train.jsonl").examples
    held_out = read_examples(test, "test.jsonl").examples
    labels = sorted({each.completion for each in known})
    if len(labels) < count:
        raise InvalidRequest(f"{folder.name} has {len(labels)} labels; {count} are needed.", param="tenants")
    return [
        Slice(
            tuple(row for row, each in zip(rows, known, strict=True) if each.completion in own)[:examples],
            tuple(each for each in held_out if each.completion in own),
        )
        for own in (set(labels[start::count]) for start in range(count))
    ]


def _rows(
    name: str, before: Mapping[str, float], after: Mapping[str, float], newest: Mapping[str, float]
) -> Iterator[Result]:
    for kind in REPLAY:
        target = MAX_LOSS if kind == "on-policy" else None
        yield Result(
            f"{name}: {kind} replay, exact match of the first slice after its run", before[kind], "of questions"
        )
        yield Result(
            f"{name}: {kind} replay, loss of the first slice", before[kind] - after[kind], "of questions", target
        )
        below = newest[ALONE] - newest[kind]
        yield Result(f"{name}: {kind} replay, newest slice below a model of it alone", below, "of questions", target)
    yield Result(f"{name}: exact match of the newest slice by a model of it alone", newest[ALONE], "of questions")
    yield Result(
        f"{name}: exact match of the first slice by a model of all slices together", after[TOGETHER], "of questions"
    )


def _name(kind: str, tenant: str) -> AdapterName:
    return AdapterName(TENANT, f"{kind}-{tenant}")


def _exact_match(
    base: Base, registry: Registry, pool: LocalPool, kind: str, slices: Mapping[str, Sequence[Slice]], index: int
) -> float:
    """Of the champions of one kind, on the test examples of one slice of each tenant."""
    tokenizer = ChatTokenizer.load(base.folder)
    questions: list[EvalQuestion] = []
    expected: list[str] = []
    for tenant, parts in slices.items():
        name = _name(kind, tenant)
        with registry.reading() as session:
            champion = adapters.get(session, name).champion
        model = name.at(champion) if champion else base.name
        questions += build_questions(model, parts[index].test, tokenizer)
        expected += [each.completion for each in parts[index].test]
    right = 0
    for answer, reference in zip(pool.answer_all(questions, lambda done: None), expected, strict=True):
        if isinstance(answer, LoramillError):
            raise answer
        right += normalized(answer.text) == normalized(reference)
    return right / len(expected)
