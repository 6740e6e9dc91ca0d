"""Nightly runs, their steps, and the new data that they train on."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from pydantic import Field

from loramill.types.base import FrozenModel


class NewData(FrozenModel):
    """New data of an adapter for one nightly run: dataset IDs, oldest first."""

    adapter: str
    train: tuple[str, ...]
    valid: tuple[str, ...]


class SetAsideData(NewData):
    """New data that a nightly run failed with; it is not used again until it is retried."""

    run: str
    stage: str
    reason: str


class NewDataState(FrozenModel):
    """New data of an adapter that no nightly run has collected yet, and whether the next one trains on it."""

    adapter: str
    examples: int
    validation_examples: int
    enough: bool = Field(description="Whether there are enough examples for the next nightly run to train on.")
    outlook: str = Field(description="What the next nightly run does with the data, or how many examples are missing.")


class AdapterData(FrozenModel):
    """A training file, and optionally a validation file, for an adapter's nightly runs.

    Attributes:
        run: the nightly run that collected the files; None while they wait.
        used_at: when that run ended.
        set_aside: why that run failed; no other run collects the files until they are retried.
    """

    adapter: str
    train: str
    train_filename: str
    train_examples: int
    valid: str | None
    valid_filename: str | None
    created_at: float
    run: str | None
    used_at: float | None
    set_aside: str | None


class StepStatus(StrEnum):
    """Status of one step of a nightly run."""

    PENDING = "pending"
    DONE = "done"
    FAILED = "failed"


class NightlyStep(FrozenModel):
    """One step of a nightly run for one adapter; `result` is the input of the next step."""

    run: str
    adapter: str
    step: str
    status: StepStatus
    result: dict[str, Any] = Field(default_factory=dict)
    finished_at: float | None = None


class NightlyRun(FrozenModel):
    """One nightly run; `finished_at` is None while it is open."""

    id: str
    created_at: float
    finished_at: float | None = None
