"""The report of a nightly run as a value; its JSON has exactly these fields.

What was not recorded is null or empty: an older run, an adapter that failed early, or a job that was deleted has fewer
numbers. The report contains no prompts and no answers.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from loramill.pipelines.nightly.outcome import Verdict
from loramill.pipelines.nightly.rollouts.overview import RolloutOverview
from loramill.types import FrozenModel, JobStatus

#: Changes when a field gets another meaning or is removed; a new field does not change it.
REPORT_VERSION: Literal[1] = 1


class ReportedScores(FrozenModel):
    """Mean scores of the candidates on one slice of held-out examples, 0 to 1; of the metric `loss`, in nats."""

    slice: str = Field(description="Name of the slice: new, before, golden, or a part of one, such as new:topic=tax.")
    examples: int = Field(description="Number of examples.")
    base: float | None = Field(default=None, description="Score of the base alone.")
    previous: float | None = Field(default=None, description="Score of the version before the champion.")
    champion: float | None = Field(default=None, description="Score of the champion before the run.")
    challenger: float | None = Field(default=None, description="Score of the version that the run trained.")


class ReportedGain(FrozenModel):
    """The challenger's score minus another candidate's on the same examples, with the gate's statistics."""

    slice: str = Field(description="Examples that were compared.")
    against: str = Field(description="The other candidate: base, previous or champion.")
    examples: int = Field(description="Number of examples.")
    gain: float = Field(description="Mean difference.")
    low: float = Field(description="Lower end of the interval of the mean difference.")
    high: float = Field(description="Upper end of the interval.")
    wins: int | None = Field(default=None, description="Examples on which the challenger scores higher.")
    losses: int | None = Field(default=None, description="Examples on which it scores lower.")
    p_better: float | None = Field(
        default=None, description="Probability of at least this gain if both were equally good."
    )
    p_worse: float | None = Field(default=None, description="Probability of at least this loss in that case.")


class LossPoint(FrozenModel):
    """The losses at one optimizer step, in nats per token."""

    step: int = Field(description="Optimizer step.")
    train: float | None = Field(default=None, description="Training loss.")
    valid: float | None = Field(default=None, description="Validation loss.")


class ReportedTraining(FrozenModel):
    """The job that trained the challenger."""

    job: str = Field(description="ID of the job.")
    status: JobStatus = Field(description="Status of the job.")
    steps: int = Field(description="Optimizer steps that it did.")
    planned_steps: int = Field(description="Optimizer steps that it was to do.")
    tokens: int = Field(description="Tokens that it trained on.")
    seconds: float | None = Field(default=None, description="Time from its first start to its end.")
    train_loss: float | None = Field(default=None, description="Last training loss.")
    valid_loss: float | None = Field(default=None, description="Last validation loss.")
    curve: tuple[LossPoint, ...] = Field(default=(), description="Losses by step, thinned out to at most 120 points.")


class ReportedQuarantine(FrozenModel):
    """Rows of the new data that were not valid examples."""

    rows: int = Field(description="Number of rows.")
    file: str | None = Field(default=None, description="ID of the file that contains them.")
    reasons: tuple[str, ...] = Field(default=(), description="Why the first of them are not valid, with file and line.")


class SliceScore(FrozenModel):
    """The score on a slice after one run."""

    run: str = Field(description="ID of the run.")
    at: float = Field(description="When that run started, in seconds since the epoch.")
    score: float = Field(description="Mean score of the version that answered after that run.")


class SliceHistory(FrozenModel):
    """How the versions of an adapter score on what one run held out of its new data, run after run."""

    run: str = Field(description="ID of the run that held the examples out.")
    at: float = Field(description="When that run started, in seconds since the epoch.")
    examples: int = Field(description="Number of examples.")
    scores: tuple[SliceScore, ...] = Field(description="Scores after that run and after later ones, oldest first.")
    change: float = Field(description="The last score minus the first.")


class ReportedCost(FrozenModel):
    """What the run used, of an adapter or in total."""

    device: Literal["gpu", "cpu"] | None = Field(default=None, description="What the jobs trained on.")
    device_seconds: float = Field(
        default=0.0,
        description="GPU-seconds or CPU-seconds of training: the time that sessions spent on the run's jobs, times the "
        "share of a GPU or the CPU threads of a session. Jobs that a session trains together share its time equally.",
    )
    tokens_trained: int = Field(default=0, description="Tokens that jobs trained on.")
    answers: int | None = Field(default=None, description="Answers that were scored.")
    tokens_answered: int | None = Field(default=None, description="Tokens of prompts and answers in the evaluation.")


class ReportLink(FrozenModel):
    """A command that shows or changes something; exactly as it is typed."""

    name: str = Field(description="What it does.")
    command: str = Field(description="The command.")
    url: str | None = Field(
        default=None, description="Page of the gateway that does the same. Null: there is none, or it is unknown."
    )


class AdapterReport(FrozenModel):
    """The run's report on one adapter."""

    adapter: str = Field(description="Name of the adapter.")
    verdict: Verdict = Field(description="How the run ended for it.")
    stage: str = Field(description="Last stage that it reached.")
    reason: str = Field(description="The reason in one or two sentences; empty while it runs.")
    metric: str = Field(default="token_f1", description="Metric of its scores.")
    before: float | None = Field(
        default=None, description="Score over all held-out examples of the champion before the run."
    )
    after: float | None = Field(default=None, description="The same of the version that answers after the run.")
    challenger: float | None = Field(default=None, description="The same of the version that the run trained.")
    base: float | None = Field(default=None, description="The same of the base alone.")
    gain: ReportedGain | None = Field(
        default=None, description="The comparison that a reader sees first: with the champion on the new examples."
    )
    old_champion: str | None = Field(default=None, description="Version that answered before the run.")
    version: str | None = Field(default=None, description="Version that the run trained.")
    champion: str | None = Field(default=None, description="Version that answers after the run.")
    scores: tuple[ReportedScores, ...] = Field(default=(), description="Scores by slice.")
    gains: tuple[ReportedGain, ...] = Field(default=(), description="The gate's comparisons.")
    choice: str | None = Field(
        default=None,
        description="Which of the versions that the run trained challenges, and why; null: it trained one.",
    )
    training: ReportedTraining | None = Field(default=None, description="The job of the version that challenges.")
    rows: dict[str, int] = Field(
        default_factory=dict, description="What became of the rows of the new data, by name: train, held_out, …"
    )
    replay: dict[str, int] = Field(
        default_factory=dict,
        description="Old examples among the training data: plain, and on_policy, with the champion's own answers to "
        "some of the old prompts; unanswered is the number of prompts that the engine did not answer.",
    )
    quarantine: ReportedQuarantine | None = Field(default=None, description="Rows that were not valid.")
    history: tuple[SliceHistory, ...] = Field(
        default=(), description="Forgetting: scores over time on what earlier runs held out, oldest run first."
    )
    cost: ReportedCost = Field(description="What the run used for this adapter.")
    links: tuple[ReportLink, ...] = Field(default=(), description="Commands for this adapter.")


class ReportTotals(FrozenModel):
    """Sums over all adapters."""

    adapters: int = Field(description="Number of adapters.")
    verdicts: dict[Verdict, int] = Field(description="Number of adapters by verdict, without zeros.")
    rows: dict[str, int] = Field(description="What became of all rows of new data, by name.")
    quarantined: int = Field(description="Number of rows that were not valid.")
    cost: ReportedCost = Field(description="What the run used.")


class EarlierFailure(FrozenModel):
    """Data that an earlier run failed with; it waits for `loramill nightly retry` or `loramill nightly drop`."""

    adapter: str = Field(description="Name of the adapter.")
    run: str = Field(description="ID of the run.")
    stage: str = Field(description="Stage that failed.")
    reason: str = Field(description="Why.")


class NightlyReport(FrozenModel):
    """The report of a nightly run."""

    version: Literal[1] = Field(default=REPORT_VERSION, description="Version of this format.")
    run: str = Field(description="ID of the run.")
    started_at: float = Field(description="When it started, in seconds since the epoch.")
    finished_at: float | None = Field(description="When it ended. Null: it has not ended, or was interrupted.")
    reported_at: float = Field(description="When the report was made.")
    succeeded: bool = Field(description="Whether nothing failed and nothing was interrupted.")
    summary: str = Field(description="The run in one sentence.")
    interrupted: str | None = Field(default=None, description="Why the run stopped before its end.")
    totals: ReportTotals = Field(description="Sums over all adapters.")
    adapters: tuple[AdapterReport, ...] = Field(description="The adapters: problems first, then changes, then others.")
    rollouts: tuple[RolloutOverview, ...] = Field(
        default=(),
        description="Canaries, shadows and watches that the run started, and those that were under way between the run "
        "before and its end.",
    )
    set_aside: tuple[EarlierFailure, ...] = Field(
        default=(), description="Data of earlier runs that still waits after a failure."
    )
