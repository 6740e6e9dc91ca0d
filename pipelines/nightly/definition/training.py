"""Sections of nightly.yaml on schedule, data and training; their descriptions become docs/reference/nightly.md."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer, ValidationError, model_validator
from pydantic_core import InitErrorDetails

from loramill.errors import InvalidRequest
from loramill.pipelines.nightly.definition.fields import (
    Cron,
    Duration,
    Globs,
    Location,
    Timezone,
)
from loramill.submission.defaults import requested_fields
from loramill.submission.options import JobOptions
from loramill.submission.sweep import check_sweep
from loramill.types import FrozenModel, JobSpec

#: Options of a job that nightly.yaml sets by other keys, or that the pipeline chooses.
_OTHER_OPTIONS = {
    "start_from": "train.start sets where training starts",
    "priority": "train.priority sets the priority",
    "base": "nightly runs train on the setting `base`",
    "objective": "new examples are trained as answers, and feedback sets what becomes preferences",
}

#: What a job needs besides its options.
_SOME_JOB = {"base": "", "adapter": "", "train": "", "steps": 1, "batch_size": 1}

#: What is not set stays so when a definition is stored and read again.
_ONLY_SET = PlainSerializer(
    lambda options: options.model_dump(mode="json", exclude_unset=True), return_type=dict[str, Any]
)


def _check_options(options: JobOptions) -> JobOptions:
    for name, instead in _OTHER_OPTIONS.items():
        if name in options.model_fields_set:
            raise ValueError(f"may not contain {name}: {instead}")
    if options.sweep is not None:
        try:
            check_sweep(options.sweep)
        except InvalidRequest as error:
            raise ValueError(error.message) from error
    faults = list(_out_of_range(options.model_dump(exclude_unset=True), ()))
    for name, values in (options.sweep or {}).items():
        for index, value in enumerate(values):
            faults += _out_of_range({name: value}, ("sweep", name, index))
    if faults:
        raise ValidationError.from_exception_data("options", faults)
    return options


def _out_of_range(options: Mapping[str, object], place: tuple[str | int, ...]) -> Iterator[InitErrorDetails]:
    """The faults of options that a job would not take; `place` leads to the value of a sweep."""
    try:
        requested = requested_fields(JobOptions.model_validate(options))
        JobSpec.model_validate(_SOME_JOB | {name: requested[name] for name in requested.keys() & JobSpec.model_fields})
    except InvalidRequest as error:
        raise ValueError(error.message) from error
    except ValidationError as error:
        for each in error.errors():
            found = InitErrorDetails(type=each["type"], loc=place or each["loc"], input=each["input"])
            yield found | {"ctx": each["ctx"]} if "ctx" in each else found


def _read_columns(value: object) -> object:
    return {} if value == "auto" else value


class ScheduleDefinition(FrozenModel):
    """When nightly runs start by themselves, while `loramill up` or the cluster runs."""

    enabled: bool = Field(
        default=True, description="Whether runs start by themselves; if not, `loramill nightly run` starts one."
    )
    cron: Cron = Field(
        default="0 2 * * *",
        description="When a run starts: minute, hour, day of month, month and day of week, as in cron. Quote it: a "
        "text that begins with * has another meaning in YAML.",
    )
    timezone: Timezone = Field(
        default="UTC",
        description="Time zone of `cron`, such as Europe/Berlin. If clocks go forward past a "
        "time, its run starts at the next time that exists; a time that occurs twice has one run.",
    )
    missed: Literal["once", "skip"] = Field(
        default="once",
        description="What happens after missed times, when nothing could start a run: one run at once, however many "
        "were missed, or none until the next time.",
    )


class SourceDefinition(FrozenModel):
    """Where new data of some adapters is found; each run adds the files that no run has read."""

    adapters: Globs = Field(default=("*",), description="Adapters that the source belongs to: globs over their names.")
    url: Location = Field(
        description="Glob of files: a path relative to this file, or a URL such as s3://bucket/{tenant}/{adapter}/*."
        "jsonl. {tenant} and {adapter} stand for the parts of an adapter's name."
    )
    columns: Annotated[dict[str, str], BeforeValidator(_read_columns)] | None = Field(
        default=None,
        description="Column of each field, such as {prompt: question, completion: answer}, for data with other names; "
        "auto finds them. Unset: the names are as in `loramill data add`.",
    )

    @model_validator(mode="after")
    def _tenants_do_not_share(self) -> Self:
        several = [glob for glob in self.adapters if re.search(r"[*?\[]", glob.partition("/")[0])]
        if several and "{tenant}" not in self.url:
            raise ValueError(
                f"url has no {{tenant}}, and '{several[0]}' matches several tenants, whose adapters would be trained "
                "on the same data; put {tenant} in it, or set `adapters` to one tenant's"
            )
        return self


class FeedbackDefinition(FrozenModel):
    """Which feedback on stored completions becomes new data."""

    corrections: bool = Field(default=True, description="Whether corrected answers become examples.")
    ratings: bool = Field(
        default=True,
        description="Whether feedback becomes preferences: an answer rated good against one rated bad, and a "
        "correction against the answer that it corrects.",
    )
    min_pairs: int = Field(
        default=20,
        ge=1,
        description="Minimum number of an adapter's preferences before a run trains on them; fewer wait.",
    )


class SplitDefinition(FrozenModel):
    """How new data is checked, and divided into training and held-out examples."""

    held_out: float = Field(
        default=0.1,
        gt=0,
        le=0.5,
        description="Fraction of the new examples that is held out to evaluate with, if they have no validation file.",
    )
    near_duplicate: float | None = Field(
        default=0.8,
        gt=0,
        le=1,
        description="Jaccard similarity, 0 to 1, from which two examples are near-duplicates; a near-duplicate of a "
        "held-out example is not trained on. Null: only equal texts are duplicates.",
    )
    max_bad_rows: float = Field(
        default=0.2,
        ge=0,
        le=1,
        description="Fraction of rows with errors above which an adapter's new data is set aside; up to it, these rows "
        "are quarantined and the others are used.",
    )
    by: str | None = Field(
        default=None,
        min_length=1,
        description="Field of the rows' `metadata` whose value decides the side, such as user: rows of one value are "
        "all held out or all trained on, in all runs, and `held_out` is the share of the values. For rows without the "
        "field, and for all rows if this is unset, the content decides.",
    )


class TrainDefinition(FrozenModel):
    """How challengers are trained."""

    start: Literal["champion", "fresh", "both"] = Field(
        default="champion",
        description="What training starts from: the champion's weights, new weights on old and new data, or both in "
        "two jobs, of which the better one becomes the challenger.",
    )
    options: Annotated[JobOptions, AfterValidator(_check_options), _ONLY_SET] = Field(
        default=JobOptions(),
        description="Options of the jobs, by the names of `loramill submit --help`, such as {rank: 16, epochs: 2}. "
        "Unset ones are as in the champion's job.",
    )
    priority: int = Field(
        default=-50,
        ge=-100,
        le=100,
        description="Priority of the jobs; those of a higher priority start first and preempt them. Jobs of users have "
        "0 by default.",
    )


class ReplayDefinition(FrozenModel):
    """Old examples that are trained together with new ones, so that the adapter does not forget."""

    plain_examples: int = Field(default=64, ge=0, description="Number of old training examples that are trained again.")
    on_policy: float = Field(
        default=0.1,
        ge=0,
        lt=1,
        description="Share of the training examples that are old prompts with the champion's own answers, in addition "
        "to `plain_examples`; 0: none.",
    )
    min_score: float = Field(
        default=0.7,
        ge=0,
        le=1,
        description="Token F1 against the old answer that the champion's answer must have to be trained on.",
    )


class BudgetDefinition(FrozenModel):
    """What one run may spend; then it starts no more training, promotes what is finished, and the rest waits."""

    wall_time: Duration | None = Field(default=None, description="Time since the run began. Unset: unlimited.")
    gpu_seconds: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="Seconds of training, times GPUs (on a CPU: times sessions). Unset: unlimited.",
    )
    tokens: int | None = Field(default=None, gt=0, description="Tokens that are trained on. Unset: unlimited.")

    @property
    def limited(self) -> bool:
        """Whether anything is limited."""
        return any(each is not None for each in (self.wall_time, self.gpu_seconds, self.tokens))
