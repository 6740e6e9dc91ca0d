"""Nightly runs, their steps, and the new data that they train on."""

from __future__ import annotations

from dataclasses import dataclass
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

    adapter: str = Field(description="Name of the adapter.")
    examples: int = Field(description="Number of training examples that wait.")
    validation_examples: int = Field(description="Number of validation examples that wait.")
    enough: bool = Field(description="Whether there are enough examples for the next nightly run to train on.")
    outlook: str = Field(description="What the next nightly run does with the data, or how many examples are missing.")


class AdapterData(FrozenModel):
    """A training file, and optionally a validation file, for an adapter's nightly runs."""

    adapter: str = Field(description="Name of the adapter.")
    train: str = Field(description="ID of the training file.")
    train_filename: str = Field(description="Name of the training file.")
    train_examples: int = Field(description="Number of training examples.")
    valid: str | None = Field(description="ID of the validation file.")
    valid_filename: str | None = Field(description="Name of the validation file.")
    created_at: float = Field(description="When it was added, in seconds since the epoch.")
    run: str | None = Field(description="Nightly run that collected it. Null while it waits.")
    used_at: float | None = Field(description="When that run ended, in seconds since the epoch.")
    set_aside: str | None = Field(
        description="Why that run failed with it. No other run collects it until it is retried."
    )


class ContentSide(StrEnum):
    """What an example of an adapter is for, in all nightly runs."""

    TRAIN = "train"
    HELD_OUT = "held_out"


@dataclass(frozen=True, slots=True)
class ContentRecord:  # an adapter may have tens of thousands, which the registry wrote: nothing is validated again
    """An example whose side was decided; `used` is false if its run's data was released for another run."""

    digest: str
    side: ContentSide
    sketch: bytes
    used: bool = True


class SourceFileRecord(FrozenModel):
    """A file of an adapter's sources, as the last scan saw it.

    Attributes:
        state: size and time or ETag of the file.
        settled: whether it was read in this state.
        content: SHA-256 of what was read.
        dataset: the dataset that it became.
        error: why it became none.
    """

    adapter: str
    url: str
    state: str
    settled: bool
    content: str | None = None
    dataset: str | None = None
    error: str | None = None


class SourceProblem(FrozenModel):
    """A source, or a file of it, that could not be read."""

    url: str = Field(description="URL of the source or the file.")
    reason: str = Field(description="Why it could not be read.")


class SourceScan(FrozenModel):
    """What the scan of the sources of a nightly run found."""

    added: int = Field(default=0, description="Number of files that became new data.")
    waiting: tuple[str, ...] = Field(
        default=(), description="Files that may still be written. The next run looks again."
    )
    problems: tuple[SourceProblem, ...] = Field(default=(), description="What could not be read.")


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
    """One nightly run.

    Attributes:
        finished_at: None while it is open.
        holder: the process that works on it, or the last one that did.
        lease_until: until when it is only that process's; None if no process works on it.
        sources: what the scan of its sources found; None while it has not ended.
    """

    id: str
    created_at: float
    finished_at: float | None = None
    holder: str | None = None
    lease_until: float | None = None
    sources: SourceScan | None = None


class ScheduledTime(FrozenModel):
    """A scheduled time of nightly runs.

    Attributes:
        scheduled_at: the time, in seconds since the epoch.
        schedule: cron expression and time zone; empty: from then on, no schedule.
        missed: number of scheduled times before it that had no run.
        run: the run that began for it; None: the schedule began at this time.
    """

    scheduled_at: float
    schedule: str
    missed: int = 0
    run: str | None = None
