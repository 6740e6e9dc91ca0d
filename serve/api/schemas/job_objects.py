"""What the endpoints of fine-tune jobs answer, as the description tells it."""

from __future__ import annotations

from typing import Any, Literal

from typing_extensions import TypedDict

from loramill.serve.api.schemas.objects import ErrorDetail, exactly
from loramill.types import Asked, Executor, JobSpec, JobStatus


@exactly
class JobError(TypedDict):
    """Why a job failed."""

    code: str | None
    message: str | None
    param: None


@exactly
class JobHyperparameters(TypedDict):
    """The spec in OpenAI's terms; `n_epochs` is null if its steps do not make whole passes over the file."""

    n_epochs: int | None
    batch_size: int
    learning_rate_multiplier: float


@exactly
class JobSupervised(TypedDict):
    """How supervised training goes."""

    hyperparameters: JobHyperparameters


@exactly
class JobMethod(TypedDict):
    """OpenAI's method."""

    type: Literal["supervised"]
    supervised: JobSupervised


@exactly
class JobExtension(TypedDict):
    """What OpenAI's job has no field for."""

    adapter: str
    status: JobStatus
    asked: Asked | None
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


@exactly
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
    error: JobError | None
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


@exactly
class JobEvent(TypedDict):
    """A line of a job's history; `data` has the numbers of a `metrics` event."""

    id: str
    object: Literal["fine_tuning.job.event"]
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any]


@exactly
class Checkpoint(TypedDict):
    """A point of a job whose weights were validated; its name is empty once they are gone."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"]
    created_at: int
    fine_tuning_job_id: str
    fine_tuned_model_checkpoint: str
    step_number: int
    metrics: dict[str, float]


@exactly
class BatchEntry(TypedDict):
    """What became of one job of a batch."""

    job: Job | None
    new: bool
    error: ErrorDetail | None


@exactly
class BatchResult(TypedDict):
    """What became of a batch; unless it was submitted, nothing was changed."""

    object: Literal["fine_tuning.batch"]
    submitted: bool
    data: list[BatchEntry]
