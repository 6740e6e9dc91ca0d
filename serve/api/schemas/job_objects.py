"""What the endpoints of fine-tune jobs answer, as the description tells it."""

from __future__ import annotations

from typing import Any, Literal

from typing_extensions import TypedDict

from loramill.serve.api.schemas.objects import ErrorDetail, no_extra_keys
from loramill.types import Executor, JobSpec, JobStatus, PendingAction


@no_extra_keys
class JobErrorObject(TypedDict):
    """Why a job failed."""

    code: str | None
    message: str | None
    param: None


@no_extra_keys
class JobHyperparameters(TypedDict):
    """The spec in OpenAI's terms; `n_epochs` is null if its steps do not make whole passes over the file."""

    n_epochs: int | None
    batch_size: int
    learning_rate_multiplier: float


@no_extra_keys
class JobSupervised(TypedDict):
    """How supervised training goes."""

    hyperparameters: JobHyperparameters


@no_extra_keys
class JobMethod(TypedDict):
    """OpenAI's method."""

    type: Literal["supervised"]
    supervised: JobSupervised


@no_extra_keys
class JobExtension(TypedDict):
    """What OpenAI's job has no field for."""

    adapter: str
    status: JobStatus
    asked: PendingAction | None
    spec: JobSpec
    priority: int
    executor: Executor
    attempt: int
    micro_tokens: int
    step: int
    steps: int
    loss: float | None
    valid_loss: float | None
    tokens_per_second: float | None
    started_at: float | None
    result: str | None
    waits_for: str | None


@no_extra_keys
class Job(TypedDict):
    """A fine-tune job; one that is paused is `queued` here, and `paused` in `loramill.status`."""

    id: str
    object: Literal["fine_tuning.job"]
    created_at: int
    finished_at: int | None
    estimated_finish: int | None
    model: str
    fine_tuned_model: str | None
    organization_id: str
    status: Literal["validating_files", "queued", "running", "succeeded", "failed", "cancelled"]
    error: JobErrorObject | None
    hyperparameters: JobHyperparameters
    method: JobMethod
    integrations: list[Any]
    training_file: str
    validation_file: str | None
    result_files: list[str]
    trained_tokens: int
    seed: int
    metadata: dict[str, str]
    loramill: JobExtension


@no_extra_keys
class JobEventObject(TypedDict):
    """A line of a job's history; `data` has the numbers of a `metrics` event."""

    id: str
    object: Literal["fine_tuning.job.event"]
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any]


@no_extra_keys
class Checkpoint(TypedDict):
    """A point of a job whose weights were validated; its name is empty once they are gone."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"]
    created_at: int
    fine_tuning_job_id: str
    fine_tuned_model_checkpoint: str
    step_number: int
    metrics: dict[str, float]


@no_extra_keys
class BatchEntry(TypedDict):
    """What became of one job of a batch."""

    job: Job | None
    new: bool
    error: ErrorDetail | None


@no_extra_keys
class BatchResult(TypedDict):
    """What became of a batch; unless it was submitted, nothing was changed."""

    object: Literal["fine_tuning.batch"]
    submitted: bool
    data: list[BatchEntry]
