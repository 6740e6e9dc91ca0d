"""The definition of nightly runs, as nightly.yaml contains it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Self, TypeVar

from pydantic import BaseModel, Field, field_serializer, model_validator

from loramill.pipelines.nightly.definition.combinations import TooManyCombinations, combinations
from loramill.pipelines.nightly.definition.fields import Globs
from loramill.pipelines.nightly.definition.promotion import (
    CanaryDefinition,
    EvaluateDefinition,
    GateDefinition,
    NotifyDefinition,
    WatchDefinition,
)
from loramill.pipelines.nightly.definition.training import (
    BudgetDefinition,
    FeedbackDefinition,
    ReplayDefinition,
    ScheduleDefinition,
    SourceDefinition,
    SplitDefinition,
    TrainDefinition,
)
from loramill.plural import listed
from loramill.types import FrozenModel

_Section = TypeVar("_Section", bound=BaseModel)


class AdapterDefinition(FrozenModel):
    """The sections that may differ between adapters, as they apply to one adapter."""

    feedback: FeedbackDefinition = Field(default=FeedbackDefinition())
    split: SplitDefinition = Field(default=SplitDefinition())
    train: TrainDefinition = Field(default=TrainDefinition())
    replay: ReplayDefinition = Field(default=ReplayDefinition())
    evaluate: EvaluateDefinition = Field(default=EvaluateDefinition())
    gate: GateDefinition = Field(default=GateDefinition())
    canary: CanaryDefinition = Field(default=CanaryDefinition())
    watch: WatchDefinition = Field(default=WatchDefinition())

    def faults(self) -> Iterator[Contradiction]:
        """The sections that contradict each other."""
        evaluate, metric, metrics = self.evaluate, self.gate.metric, self.evaluate.computed_metrics
        for name in ("scorer", "judge"):
            is_set, keys = getattr(evaluate, name) is not None, (("evaluate", "metrics"), ("evaluate", name))
            if name in metrics and not is_set:
                yield Contradiction(keys, f"evaluate.metrics contains {name}, but evaluate.{name} is not set")
            if is_set and name not in metrics:
                reason = (
                    f"evaluate.{name} is set, but evaluate.metrics does not list {name}; add it, or set {name} to null"
                )
                yield Contradiction(keys, reason)
        if metric not in metrics:
            unset = metric in ("scorer", "judge") and getattr(evaluate, metric) is None
            missing = f"evaluate.{metric} is not set" if unset else "evaluate.metrics does not list it"
            yield Contradiction(
                (("gate", "metric"), ("evaluate", "metrics")), f"gate.metric is {metric}, but {missing}"
            )
        if self.canary.starts and not self.watch.window:
            reason = "watch.window is 0s, but a canary lasts that long; set a longer one, or no canary"
            yield Contradiction((("watch", "window"), ("canary", "share"), ("canary", "shadow")), reason)


@dataclass(frozen=True, slots=True)
class Contradiction:
    """What is wrong with sections, and the keys that it is about: the first one that the file has is where it is."""

    keys: tuple[tuple[str | int, ...], ...]
    reason: str


class DefinitionFault(ValueError):
    """Sections contradict each other."""

    def __init__(self, found: Sequence[Contradiction]) -> None:
        super().__init__("; ".join(each.reason for each in found))
        self.found = tuple(found)


class OverrideDefinition(FrozenModel):
    """Other values for some adapters; what it does not set stays as it is for all."""

    adapters: Globs = Field(description="Adapters that the values are for: globs over their names.")
    feedback: FeedbackDefinition | None = Field(default=None, description="As the section `feedback`.")
    split: SplitDefinition | None = Field(default=None, description="As the section `split`.")
    train: TrainDefinition | None = Field(default=None, description="As the section `train`.")
    replay: ReplayDefinition | None = Field(default=None, description="As the section `replay`.")
    evaluate: EvaluateDefinition | None = Field(default=None, description="As the section `evaluate`.")
    gate: GateDefinition | None = Field(default=None, description="As the section `gate`.")
    canary: CanaryDefinition | None = Field(default=None, description="As the section `canary`.")
    watch: WatchDefinition | None = Field(default=None, description="As the section `watch`.")


class NightlyDefinition(FrozenModel):
    """What nightly runs do, and when. An empty file is valid, and so is one with a single key."""

    schedule: ScheduleDefinition = Field(default=ScheduleDefinition(), description="When runs start by themselves.")
    adapters: Globs = Field(
        default=("*",), description="Adapters that runs retrain, by globs over their names: *, acme/*, */support."
    )
    exclude: Globs = Field(
        default=(), description="Globs of adapters to leave out, among those that `adapters` selects."
    )
    sources: tuple[SourceDefinition, ...] = Field(
        default=(), description="Where new data is found, in addition to `loramill data add`."
    )
    feedback: FeedbackDefinition = Field(default=FeedbackDefinition(), description="Feedback as new data.")
    split: SplitDefinition = Field(default=SplitDefinition(), description="Checks of new data, and held-out examples.")
    train: TrainDefinition = Field(default=TrainDefinition(), description="Training of challengers.")
    replay: ReplayDefinition = Field(default=ReplayDefinition(), description="Old examples among the new ones.")
    evaluate: EvaluateDefinition = Field(default=EvaluateDefinition(), description="Scores of held-out examples.")
    gate: GateDefinition = Field(default=GateDefinition(), description="Promotion of challengers.")
    canary: CanaryDefinition = Field(default=CanaryDefinition(), description="Introduction of challengers.")
    watch: WatchDefinition = Field(default=WatchDefinition(), description="Rollback of new champions.")
    budget: BudgetDefinition = Field(default=BudgetDefinition(), description="What one run may spend.")
    notify: NotifyDefinition = Field(default=NotifyDefinition(), description="A message after each run.")
    overrides: tuple[OverrideDefinition, ...] = Field(
        default=(), description="Other values for some adapters; where several match an adapter, later ones win."
    )

    @field_serializer("overrides")
    def _only_set(self, overrides: tuple[OverrideDefinition, ...]) -> list[dict[str, Any]]:
        """What an override does not set stays so when a definition is stored and read again."""
        return [override.model_dump(mode="json", exclude_unset=True) for override in overrides]

    @model_validator(mode="before")
    @classmethod
    def _empty_sections_are_defaults(cls, value: object) -> object:
        """A section's name without content, which YAML reads as null, is the same as no section."""
        if not isinstance(value, dict):
            return value
        return {key: each for key, each in value.items() if each is not None or key not in cls.model_fields}

    @model_validator(mode="after")
    def _sections_fit(self) -> Self:
        try:
            applied = combinations([each.adapters for each in self.overrides])
        except TooManyCombinations as error:
            reason = "their globs can match together in too many ways; use fewer with several *"
            raise DefinitionFault([Contradiction((("overrides",),), reason)]) from error
        found: dict[Contradiction, Contradiction] = {}
        for numbers in sorted(applied, key=lambda each: (len(each), each)):
            for cause, shown in self._faults(numbers, applied[numbers]):
                found.setdefault(cause, shown)
        if found:
            raise DefinitionFault(list(found.values()))
        return self

    def _faults(self, numbers: tuple[int, ...], adapter: str) -> Iterator[tuple[Contradiction, Contradiction]]:
        """The contradictions under some overrides together, as they are and as they are shown, with the override.

        Args:
            numbers: of the overrides, in their order.
            adapter: an adapter that exactly these match.
        """
        overrides = [self.overrides[number] for number in numbers]
        steps = [set(self._overlaid(overrides[:count]).faults()) for count in range(len(overrides) + 1)]
        for fault in sorted(steps[-1], key=lambda each: each.reason):
            # The last override before which there was no such contradiction.
            last = next((count for count in reversed(range(len(steps))) if fault not in steps[count]), None)
            if last is None:
                yield fault, fault
                continue
            keys = tuple(("overrides", numbers[last], *key) for key in fault.keys)
            alone = fault in set(self._overlaid([overrides[last]]).faults())
            together = listed([str(number + 1) for number in numbers])
            reason = fault.reason if alone else f"{fault.reason}. Overrides {together} match adapters such as {adapter}"
            yield Contradiction(keys, fault.reason), Contradiction(keys, reason)

    def includes(self, adapter: str) -> bool:
        """Whether runs retrain an adapter."""
        return matches(adapter, self.adapters) and not matches(adapter, self.exclude)

    def for_adapter(self, adapter: str) -> AdapterDefinition:
        """Returns the sections that may differ between adapters, with the overrides that match this one."""
        return self._overlaid([each for each in self.overrides if matches(adapter, each.adapters)])

    def _overlaid(self, overrides: Iterable[OverrideDefinition]) -> AdapterDefinition:
        found = AdapterDefinition(**{name: getattr(self, name) for name in AdapterDefinition.model_fields})
        for override in overrides:
            sections = {name: getattr(override, name) for name in AdapterDefinition.model_fields}
            changed = {
                name: _overlay(getattr(found, name), section)
                for name, section in sections.items()
                if section is not None
            }
            found = found.model_copy(update=changed)
        return found


def matches(adapter: str, globs: Iterable[str]) -> bool:
    """Whether an adapter's name matches one of the globs."""
    return any(fnmatchcase(adapter, glob) for glob in globs)


def _overlay(section: _Section, changes: _Section) -> _Section:
    """A section with the values that another one sets."""
    values: dict[str, object] = {}
    for name in changes.model_fields_set:
        old, new = getattr(section, name), getattr(changes, name)
        both = isinstance(old, BaseModel) and isinstance(new, BaseModel)
        values[name] = _overlay(old, new) if both else new
    return section.model_copy(update=values)
