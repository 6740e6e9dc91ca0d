"""Which of the versions that a run has trained challenges the champion. A pure function of their jobs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from loramill.plural import listed
from loramill.types import JobRecord, JobStatus

#: The starts of training in words; the first one is chosen where the losses are equal.
STARTS = {"champion": "from the champion", "fresh": "from new weights"}
#: The job that continues the chosen version with preferences.
PREFERENCES = "preferences"
_ENDS = {JobStatus.FAILED: "failed", JobStatus.CANCELLED: "was cancelled"}


@dataclass(frozen=True, slots=True)
class StartChoice:
    """The start whose version challenges, and the reason in one sentence; empty if there was no choice."""

    start: str
    reason: str


def choose_start(jobs: Mapping[str, JobRecord]) -> StartChoice | None:
    """Chooses the version with the lower validation loss; all jobs have the same validation file.

    Args:
        jobs: the jobs by start, all of them ended.

    Returns:
        None if no job has succeeded.
    """
    order = [start for start in STARTS if start in jobs]  # without that on preferences
    succeeded = [start for start in order if jobs[start].status is JobStatus.SUCCEEDED]
    if not succeeded:
        return None
    if len(order) == 1:
        return StartChoice(order[0], "")
    if len(succeeded) < len(order):
        ended = listed(
            [f"the job {STARTS[each]} {_ENDS[jobs[each].status]}" for each in order if each not in succeeded]
        )
        return StartChoice(succeeded[0], f"Trained {STARTS[succeeded[0]]}: {ended}.")
    losses = {start: _loss(jobs[start]) for start in succeeded}
    best = min(succeeded, key=lambda start: losses[start])
    shown = listed([f"{_shown(losses[start])} {STARTS[start]}" for start in succeeded])
    return StartChoice(best, f"Trained {STARTS[best]}: the validation loss is {shown}.")


def after_preferences(choice: StartChoice, job: JobRecord | None, waiting: str = "") -> StartChoice:
    """The version that challenges after a job on preferences, which continued the chosen version.

    Args:
        choice: the version before it.
        job: the job, which has ended; None: there was none.
        waiting: why there was none, although there are preferences; without a full stop.
    """
    if waiting:
        reason = f"The preferences wait: {waiting}."
    elif job is None:
        return choice
    elif job.status is JobStatus.SUCCEEDED:
        return StartChoice(PREFERENCES, f"{choice.reason} Then trained on preferences.".lstrip())
    else:
        reason = f"The version before the preferences, whose job {_ENDS[job.status]}."
    return StartChoice(choice.start, f"{choice.reason} {reason}".lstrip())


def _shown(loss: float) -> str:
    return f"{loss:.4g}" if math.isfinite(loss) else "unknown"


def _loss(job: JobRecord) -> float:
    """The validation loss, infinite if it is unknown."""
    return job.valid_loss if job.valid_loss is not None and math.isfinite(job.valid_loss) else math.inf
