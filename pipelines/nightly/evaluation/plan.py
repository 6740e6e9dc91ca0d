"""What an adapter is evaluated on: its candidates, and its held-out examples, each once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from loramill.data.examples import Example, read_examples
from loramill.errors import NotFound
from loramill.names import AdapterName
from loramill.pipelines.nightly.context import NightlyContext
from loramill.pipelines.nightly.definition import EvaluateDefinition, GateDefinition
from loramill.pipelines.nightly.evaluation.golden import read_golden
from loramill.pipelines.nightly.evaluation.results import (
    GOLDEN_SLICE,
    HeldOutExample,
    divided,
    held_out_examples,
    slice_kind,
)
from loramill.registry import adapters, datasets
from loramill.types import Candidate


@dataclass(frozen=True, slots=True)
class EvalCandidate:
    """A model that is evaluated.

    Attributes:
        model: its name in the API.
        version: None for the base.
    """

    role: Candidate
    model: str
    version: str | None


@dataclass(frozen=True, slots=True)
class EvalPlan:
    """What an adapter is evaluated on.

    Attributes:
        datasets: the dataset of each whole slice.
        examples: each once, in the order in which they are asked: golden ones, new ones, old ones.
    """

    adapter: str
    candidates: tuple[EvalCandidate, ...]
    datasets: Mapping[str, str]
    examples: tuple[HeldOutExample, ...]
    definition: EvaluateDefinition
    gate: GateDefinition

    def dataset(self, slice_: str) -> str:
        """The dataset of a slice; a part, such as `new:topic=tax`, is in that of the whole."""
        return self.datasets[slice_.partition(":")[0]]


def plan_evaluation(context: NightlyContext, adapter: str) -> EvalPlan:
    """Reads an adapter's held-out slices, and finds its candidates.

    Raises:
        NotFound: the adapter, a version or a slice was deleted.
        SettingsInvalid, Unavailable, DatasetInvalid: the golden set cannot be read.
    """
    collected, trained = context.finished(adapter, "collect"), context.finished(adapter, "train")
    definition = context.definition.for_adapter(adapter)
    frozen: Mapping[str, str] = collected["slices"]
    slices: dict[str, Sequence[Example]] = {
        name: load_examples(context, frozen[name]) for name in sorted(frozen, key=_rank)
    }
    if definition.evaluate.slices_by is not None:
        slices = divided(slices, definition.evaluate.slices_by)
    golden = {}
    if definition.evaluate.golden is not None:
        dataset, examples = read_golden(context.registry, AdapterName.parse(adapter), definition.evaluate.golden)
        golden, slices = {GOLDEN_SLICE: dataset}, {GOLDEN_SLICE: examples} | slices
    return EvalPlan(
        adapter=adapter,
        candidates=_candidates(context, adapter, collected, trained["version"]),
        datasets={**frozen, **golden},
        examples=tuple(held_out_examples(slices)),
        definition=definition.evaluate,
        gate=definition.gate,
    )


def _rank(slice_: str) -> bool:
    """New examples first: a challenger that gains nothing on them needs no old ones."""
    return slice_kind(slice_) == "old"


def _candidates(
    context: NightlyContext, adapter: str, collected: Mapping[str, Any], challenger: str
) -> tuple[EvalCandidate, ...]:
    """There is no champion before the first promotion, and no previous one before the first champion."""
    name, versions = AdapterName.parse(adapter), dict[Candidate, str]()
    if previous := collected.get("previous"):
        with context.registry.reading() as session, suppress(NotFound):  # deleted since
            versions["previous"] = adapters.get_version(session, previous).id
    if collected["champion"]:
        versions["champion"] = collected["champion"]
    versions["challenger"] = challenger
    return (
        EvalCandidate("base", context.base.name, None),
        *(EvalCandidate(role, name.at(version), version) for role, version in versions.items()),
    )


def load_examples(context: NightlyContext, dataset: str) -> tuple[Example, ...]:
    """Reads the examples of a dataset."""
    with context.registry.reading() as session:
        found = datasets.get(session, dataset)
    return read_examples(context.registry.artifacts.read(found.artifact, "data.jsonl"), found.filename).examples
