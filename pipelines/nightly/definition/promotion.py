"""Sections of nightly.yaml on evaluation and promotion; their descriptions become docs/reference/nightly.md."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from loramill.pipelines.nightly.definition.fields import (
    Duration,
    Location,
    PythonFunction,
    WebUrl,
)
from loramill.types import FrozenModel, WatchLimits

#: Scores of an answer, each 0 to 1; `loss` is the mean loss per token of the reference, in nats.
Metric = Literal["loss", "exact_match", "token_f1", "rouge_l", "json_valid", "scorer", "judge"]
#: What is computed unless `metrics` is set.
DEFAULT_METRICS: tuple[Metric, ...] = ("exact_match", "token_f1", "rouge_l")


def _check_metrics(metrics: tuple[Metric, ...]) -> tuple[Metric, ...]:
    if not metrics:
        raise ValueError("must contain at least one metric")
    if repeated := [name for name in metrics if metrics.count(name) > 1]:
        raise ValueError(f"may not contain {repeated[0]} twice")
    return metrics


def _check_variable(value: str) -> str:
    if not re.fullmatch(r"\$\{[A-Za-z_][A-Za-z0-9_]*\}", value):
        raise ValueError("must be ${NAME}, an environment variable, since a file is not a place for secrets")
    return value


def _check_prompt(value: str) -> str:
    if "{answer}" not in value:
        raise ValueError("must contain {answer}")
    return value


def _check_positive(value: timedelta) -> timedelta:
    if not value:
        raise ValueError("must be longer than 0s")
    return value


def _check_options(value: dict[str, Any]) -> dict[str, Any]:
    if taken := sorted(value.keys() & {"model", "messages", "stream", "n"}):
        raise ValueError(f"may not contain {taken[0]}, which is set already")
    return value


class JudgeDefinition(FrozenModel):
    """A language model that scores answers, behind any endpoint in OpenAI's format."""

    url: WebUrl = Field(description="URL of the endpoint, including /v1; may contain ${NAME}, an environment variable.")
    model: str = Field(min_length=1, description="Name of the model.")
    prompt: Annotated[str, AfterValidator(_check_prompt)] | None = Field(
        default=None,
        description="Instruction to the judge, in which {question}, {reference} and {answer} are replaced; it has to "
        "request a score from 0 to 10, the last number of the judge's answer. Unset: a built-in one.",
    )
    api_key: Annotated[str, AfterValidator(_check_variable)] | None = Field(
        default=None, description="API key, as ${NAME}: the environment variable that contains it."
    )
    options: Annotated[dict[str, Any], AfterValidator(_check_options)] = Field(
        default={"temperature": 0},
        description="Further fields of the requests, such as {reasoning_effort: low, max_completion_tokens: 500}.",
    )


class EvaluateDefinition(FrozenModel):
    """What challenger, champion and base are scored on."""

    metrics: Annotated[tuple[Metric, ...], AfterValidator(_check_metrics)] | None = Field(
        default=None,
        description="Scores that are computed for each answer. Unset: exact_match, token_f1 and rouge_l, and scorer "
        "and judge where they are set.",
    )
    scorer: PythonFunction | None = Field(
        default=None,
        description="A Python function for the metric `scorer`, as package.module:function or folder/file.py:function. "
        "It gets the question, the reference and the answer, and returns 0 to 1. It runs in a process of its own.",
    )
    scorer_time_limit: Annotated[Duration, AfterValidator(_check_positive)] = Field(
        default=timedelta(minutes=2),
        description="Time that the scorer has for a chunk of an adapter's answers.",
    )
    judge: JudgeDefinition | None = Field(default=None, description="The model for the metric `judge`.")
    slices_by: str | None = Field(
        default=None,
        min_length=1,
        description="Field of the rows' `metadata` by whose values held-out examples are divided into slices, each "
        "with at least 5 examples.",
    )
    golden: Location | None = Field(
        default=None,
        description="Examples that a challenger must answer correctly: a path or URL, in which {tenant} and {adapter} "
        "are replaced, or the ID of a dataset.",
    )
    stop_early: bool = Field(
        default=True,
        description="Whether an adapter's evaluation stops once the remaining examples cannot change whether its "
        "challenger is promoted.",
    )

    @property
    def computed_metrics(self) -> tuple[Metric, ...]:
        """The scores that are computed, with the default filled in."""
        custom: tuple[Metric, ...] = ("scorer", "judge")
        return self.metrics or (*DEFAULT_METRICS, *(name for name in custom if getattr(self, name) is not None))


class GateDefinition(FrozenModel):
    """When a challenger replaces the champion."""

    metric: Metric = Field(
        default="token_f1", description="Score that decides; one of `evaluate.metrics`. For `loss`, lower is better."
    )
    confidence: float = Field(
        default=0.95, ge=0.5, lt=1, description="Confidence that a gain must have, over all new examples together."
    )
    max_loss: float = Field(
        default=0.05,
        ge=0,
        le=1,
        description="How much worse than the champion a challenger may be on old data, in the metric.",
    )
    min_gain: float = Field(
        default=0.0, ge=0, le=1, description="By how much a challenger must be better on new data, in the metric."
    )
    min_golden: float = Field(
        default=1.0, ge=0, le=1, description="Fraction of the golden examples that a challenger must answer correctly."
    )
    approval: Literal["automatic", "manual"] = Field(
        default="automatic",
        description="automatic: a challenger that passes is promoted. manual: it waits for `loramill nightly "
        "approve`, until a later challenger passes.",
    )


#: Share of the requests that a shadow copies if `canary.share` is 0.
SHADOW_SHARE = 0.1


class CanaryDefinition(FrozenModel):
    """How a challenger that passed the gate is introduced."""

    share: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Share of the requests that the challenger answers for `watch.window` before it is promoted, by "
        "user or API key, so that each gets one version; 0: it is promoted at once.",
    )
    shadow: bool = Field(
        default=False,
        description="Whether the challenger answers copies of the share instead (of a tenth, if the share is 0); these "
        "answers are compared, never sent.",
    )

    @property
    def starts(self) -> bool:
        """Whether a challenger is tried before it is promoted."""
        return self.shadow or self.share > 0


class WatchDefinition(WatchLimits):
    """When a new champion is rolled back automatically."""

    window: Duration = Field(
        default=timedelta(hours=1),
        description="How long a canary lasts, and how long a new champion is watched; 0s: not at all. With fewer "
        "requests than `min_requests`, up to 20 hours longer.",
    )


class NotifyDefinition(FrozenModel):
    """A message after each run."""

    webhook: WebUrl | None = Field(
        default=None,
        description="URL that gets the message as JSON in Slack's format; may contain ${NAME}, an environment "
        "variable.",
    )
    on: Literal["always", "changes", "problems"] = Field(
        default="changes",
        description="After which runs: all, those that promoted, ask for approval or failed, or those that failed; "
        "also if a version was rolled back since the run before.",
    )
