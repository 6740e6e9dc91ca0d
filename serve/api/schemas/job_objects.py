"""Responses about fine-tune jobs."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from loramill.serve.api.schemas.common import CreatedAt, ErrorDetail, ObjectType, response_object
from loramill.types import Executor, JobSpec, JobStatus, PendingAction, SweepCandidate


@response_object
class JobErrorObject(TypedDict):
    """Why a job failed."""

    code: Annotated[str | None, Field(description="Code of the error.")]
    message: Annotated[str | None, Field(description="What went wrong and what to do.")]
    param: Annotated[None, Field(description="Always null.")]


@response_object
class JobHyperparameters(TypedDict):
    """The spec in OpenAI's terms."""

    n_epochs: Annotated[
        int | None, Field(description="Passes over the file; null: the steps do not make whole passes.")
    ]
    batch_size: Annotated[int, Field(description="Examples per optimizer step.")]
    learning_rate_multiplier: Annotated[float, Field(description="Learning rate relative to the default.")]


@response_object
class JobDpoHyperparameters(JobHyperparameters):
    """The spec of preference tuning in OpenAI's terms."""

    beta: Annotated[float, Field(description="How strongly the model is kept close to its start.")]


@response_object
class JobSupervised(TypedDict):
    """Supervised training."""

    hyperparameters: Annotated[JobHyperparameters, Field(description="The hyperparameters.")]


@response_object
class JobDpo(TypedDict):
    """Preference tuning."""

    hyperparameters: Annotated[JobDpoHyperparameters, Field(description="The hyperparameters.")]


@response_object
class JobMethod(TypedDict):
    """The training method in OpenAI's terms."""

    type: Annotated[
        Literal["supervised", "dpo"],
        Field(description="Type of the method; `dpo` for all preference tuning, whose objective is in the spec."),
    ]
    supervised: NotRequired[Annotated[JobSupervised, Field(description="Options of supervised training.")]]
    dpo: NotRequired[Annotated[JobDpo, Field(description="Options of preference tuning.")]]


@response_object
class JobExtension(TypedDict):
    """Fields that OpenAI's job object does not have."""

    adapter: Annotated[str, Field(description="Adapter that gets the new version.")]
    status: Annotated[JobStatus, Field(description="Status of the job, which can also be `paused`.")]
    pending_action: Annotated[
        PendingAction | None, Field(description="Requested of the running job, which has not complied yet.")
    ]
    spec: Annotated[JobSpec, Field(description="The whole spec.")]
    priority: Annotated[int, Field(description="Jobs of a higher priority run first.")]
    executor: Annotated[Executor, Field(description="Where it runs: in a shared session, or in a trainer of its own.")]
    attempt: Annotated[int, Field(description="Number of times that a worker took the job.")]
    micro_tokens: Annotated[int, Field(description="Tokens per forward pass, which shrink if memory runs out.")]
    step: Annotated[int, Field(description="Optimizer steps done.")]
    steps: Annotated[int, Field(description="Optimizer steps in all.")]
    loss: Annotated[float | None, Field(description="Loss of the last step, in nats per token.")]
    valid_loss: Annotated[float | None, Field(description="Last validation loss, in nats per token.")]
    tokens_per_second: Annotated[float | None, Field(description="Training speed.")]
    started_at: Annotated[float | None, Field(description="When it first ran, in seconds since the epoch.")]
    result: Annotated[str | None, Field(description="Artifact with the weights of a full fine-tune.")]
    sweep: Annotated[list[SweepCandidate], Field(description="The candidates of a sweep, and how far each is.")]
    waits_for: Annotated[str | None, Field(description="What a queued job waits for besides a free worker.")]


@response_object
class Job(TypedDict):
    """A fine-tune job. A paused job has the status `queued` here, and `paused` in `loramill.status`."""

    id: Annotated[str, Field(description="ID of the job.")]
    object: ObjectType[Literal["fine_tuning.job"]]
    created_at: CreatedAt
    finished_at: Annotated[int | None, Field(description="When it ended, in seconds since the epoch.")]
    estimated_finish: Annotated[int | None, Field(description="When it will end at the current speed.")]
    model: Annotated[str, Field(description="The base model.")]
    fine_tuned_model: Annotated[str | None, Field(description="Name of the new version.")]
    organization_id: Annotated[str, Field(description="Tenant that owns the job.")]
    status: Annotated[
        Literal["validating_files", "queued", "running", "succeeded", "failed", "cancelled"],
        Field(description="Status of the job."),
    ]
    error: Annotated[JobErrorObject | None, Field(description="Why the job failed.")]
    hyperparameters: Annotated[JobHyperparameters, Field(description="The hyperparameters.")]
    method: Annotated[JobMethod, Field(description="The training method.")]
    integrations: Annotated[list[Any], Field(description="Always empty.")]
    training_file: Annotated[str, Field(description="ID of the training file.")]
    validation_file: Annotated[str | None, Field(description="ID of the validation file.")]
    result_files: Annotated[list[str], Field(description="ID of the file with the job's metrics, once it has ended.")]
    trained_tokens: Annotated[int, Field(description="Number of tokens trained on.")]
    seed: Annotated[int, Field(description="Seed of the training.")]
    metadata: Annotated[dict[str, str], Field(description="Pairs of strings given at submission.")]
    loramill: Annotated[JobExtension, Field(description="More about the job.")]


@response_object
class JobEventObject(TypedDict):
    """An event in a job's history."""

    id: Annotated[str, Field(description="ID of the event.")]
    object: ObjectType[Literal["fine_tuning.job.event"]]
    created_at: CreatedAt
    level: Annotated[Literal["info", "warn", "error"], Field(description="Level of the event.")]
    message: Annotated[str, Field(description="What happened.")]
    type: Annotated[Literal["message", "metrics"], Field(description="Type of the event.")]
    data: Annotated[dict[str, Any], Field(description="Numbers of a `metrics` event.")]


@response_object
class Checkpoint(TypedDict):
    """A step at which a job's weights were validated."""

    id: Annotated[str, Field(description="ID of the checkpoint.")]
    object: ObjectType[Literal["fine_tuning.job.checkpoint"]]
    created_at: CreatedAt
    fine_tuning_job_id: Annotated[str, Field(description="ID of the job.")]
    fine_tuned_model_checkpoint: Annotated[
        str, Field(description="Model name of the weights; empty: they are not kept.")
    ]
    step_number: Annotated[int, Field(description="Optimizer step.")]
    metrics: Annotated[dict[str, float], Field(description="Metrics of the validation.")]


@response_object
class BatchEntry(TypedDict):
    """The outcome for one job of a batch."""

    job: Annotated[Job | None, Field(description="The job; null: it was only checked, or not submitted.")]
    new: Annotated[bool, Field(description="Whether this request submitted it.")]
    error: Annotated[ErrorDetail | None, Field(description="Why it cannot be submitted.")]


@response_object
class BatchResult(TypedDict):
    """The outcome of a batch."""

    object: ObjectType[Literal["fine_tuning.batch"]]
    submitted: Annotated[bool, Field(description="Whether the batch was submitted; otherwise nothing was changed.")]
    data: Annotated[list[BatchEntry], Field(description="One entry per job, in the order of the request.")]
