"""Requests for fine-tune jobs; and jobs, events and checkpoints in OpenAI's format."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from loramill.errors import InvalidRequest, UnsupportedParameter
from loramill.halving import trained_steps
from loramill.models.catalog import Base
from loramill.names import SHORT_HASH_LENGTH, AdapterName, check_name, results_id
from loramill.serve.api.schemas.common import Metadata, RequestBody
from loramill.submission.defaults import openai_hyperparameters
from loramill.submission.references import named_by
from loramill.submission.request import DpoHyperparameters, Hyperparameters, JobRequest, LoramillOptions
from loramill.types import CheckpointRecord, JobEvent, JobRecord, JobStatus

#: The id of an event is this prefix and a number, of no more digits than fit in a database's integer.
EVENT_PREFIX = "ftevent-"
EVENT_ID_PATTERN = rf"^{EVENT_PREFIX}[0-9]{{1,18}}$"


class SupervisedMethod(RequestBody):
    """Supervised training."""

    hyperparameters: Hyperparameters | None = Field(default=None, description="The hyperparameters.")


class DpoMethod(RequestBody):
    """Preference tuning."""

    hyperparameters: DpoHyperparameters | None = Field(default=None, description="The hyperparameters.")


class Method(RequestBody):
    """OpenAI's training method: `supervised`, or `dpo` for preference tuning."""

    type: Literal["supervised", "dpo", "reinforcement"] = Field(description="Type of the method.")
    supervised: SupervisedMethod | None = Field(default=None, description="Supervised training.")
    dpo: DpoMethod | None = Field(default=None, description="Preference tuning.")
    reinforcement: dict[str, Any] | None = Field(default=None, description="Not supported.")


class NewJob(RequestBody):
    """OpenAI's request for a job, with more options under `loramill`."""

    no_op_values: ClassVar[Mapping[str, Sequence[Any]]] = {"integrations": ([],)}
    model: str = Field(description="The base model.")
    training_file: str = Field(description="ID of the file with training examples.")
    validation_file: str | None = Field(default=None, description="ID of a file with validation examples.")
    suffix: str = Field(default="default", description="Name of the adapter, without its tenant.")
    seed: int = Field(default=0, ge=0, lt=2**32, description="Seed of the training.")
    metadata: Metadata = Field(default={}, description="Up to 16 pairs of strings, by which jobs can be listed.")
    method: Method | None = Field(default=None, description="The training method and its hyperparameters.")
    hyperparameters: Hyperparameters | None = Field(
        default=None, description="Hyperparameters as in older versions of OpenAI's API, instead of `method`."
    )
    integrations: list[dict[str, Any]] | None = Field(default=None, description="Not supported.")
    loramill: LoramillOptions = Field(default=LoramillOptions(), description="More options of the job.")

    def to_request(self, tenant: str) -> JobRequest:
        """The request of `tenant`, as `loramill.submission` takes it.

        Raises:
            UnsupportedParameter, InvalidRequest: as `hyperparameters_or_default`, or the suffix is not a name, or the
                method and the objective differ.
        """
        hyperparameters = self.hyperparameters_or_default()
        with named_by("suffix"):
            adapter = AdapterName(tenant, check_name(self.suffix, "adapter"))
        return JobRequest(
            adapter=adapter,
            train=self.training_file,
            valid=self.validation_file,
            base=self.model,
            seed=self.seed,
            metadata=self.metadata,
            hyperparameters=hyperparameters,
            options=self._options(),
        )

    def _options(self) -> LoramillOptions:
        """loramill's options, with the objective that the method implies."""
        objective = self.loramill.objective
        if self.method is None:
            return self.loramill
        if self.method.type == "dpo" and objective is None:
            return self.loramill.model_copy(update={"objective": "dpo"})
        if objective is not None and (self.method.type == "supervised") != (objective == "sft"):
            raise InvalidRequest(
                f"'method.type' is '{self.method.type}' and 'loramill.objective' is '{objective}': 'supervised' goes "
                "with 'sft', and 'dpo' with 'dpo', 'orpo' and 'kto'.",
                param="loramill.objective",
            )
        return self.loramill

    def hyperparameters_or_default(self) -> Hyperparameters:
        """The hyperparameters, from either place.

        Raises:
            UnsupportedParameter: the method is reinforcement learning, or there are integrations.
            InvalidRequest: both places have hyperparameters, and they differ.
        """
        if self.method and self.method.type == "reinforcement":
            raise UnsupportedParameter(
                "The method 'reinforcement' is not supported; 'method.type' must be 'supervised' or 'dpo'.",
                param="method.type",
            )
        if self.integrations:
            raise UnsupportedParameter(
                "Integrations per job are not supported: the setting jobs.loggers (such as "
                "LORAMILL_JOBS__LOGGERS='[\"wandb\"]') applies to all jobs; omit 'integrations'.",
                param="integrations",
            )
        method = getattr(self.method, self.method.type) if self.method else None
        newer = method.hyperparameters if method else None
        if newer and self.hyperparameters and newer != self.hyperparameters:
            raise InvalidRequest(
                "'hyperparameters' and those of 'method' differ; give one of them.", param="hyperparameters"
            )
        return newer or self.hyperparameters or Hyperparameters()


def job_object(job: JobRecord, base: Base, examples: int | None, now: float | None = None) -> dict[str, Any]:
    """Returns a job object.

    OpenAI's types have no status `paused`: a paused job is `queued`, and `paused` in `loramill.status`.

    Args:
        job: the job.
        base: the base model that the gateway serves.
        examples: number of examples in the job's training file; None: it was deleted.
        now: seconds since the epoch.
    """
    spec = job.spec
    hyperparameters = openai_hyperparameters(spec, examples)
    # OpenAI's name for preference tuning; `loramill.spec.objective` distinguishes its objectives.
    method = "supervised" if spec.objective == "sft" else "dpo"
    of_method = hyperparameters if method == "supervised" else hyperparameters | {"beta": spec.beta}
    failed, waits = job.status is JobStatus.FAILED, job.status is JobStatus.PAUSED
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "created_at": int(job.created_at),
        "finished_at": int(job.finished_at) if job.finished_at else None,
        "estimated_finish": _estimated_finish(job, time.time() if now is None else now),
        "model": base.name if spec.base == base.fingerprint else spec.base[:SHORT_HASH_LENGTH],
        "fine_tuned_model": spec.adapter_name.at(job.version) if job.version else None,
        "organization_id": job.tenant,
        "status": JobStatus.QUEUED if waits else job.status,
        "error": {"code": job.error_code, "message": job.error_message, "param": None} if failed else None,
        "hyperparameters": hyperparameters,
        "method": {"type": method, method: {"hyperparameters": of_method}},
        "integrations": [],
        "training_file": spec.train,
        "validation_file": spec.valid,
        "result_files": [results_id(job.id)] if job.status.final and job.step else [],
        "trained_tokens": job.trained_tokens,
        "seed": spec.seed,
        "metadata": job.metadata,
        "loramill": _extension_object(job) | {"waits_for": _waits_for(job, base)},
    }


def _waits_for(job: JobRecord, base: Base) -> str | None:
    """What a queued job waits for besides a free worker; None: nothing."""
    if job.status is not JobStatus.QUEUED or job.spec.base == base.fingerprint:
        return None
    return f"base {job.spec.base[:SHORT_HASH_LENGTH]}, which is not served here"


def _extension_object(job: JobRecord) -> dict[str, Any]:
    """Fields that OpenAI's object does not have."""
    return {
        "adapter": job.spec.adapter,
        "status": job.status,
        "pending_action": job.pending_action,
        "spec": job.spec.model_dump(mode="json"),
        "priority": job.priority,
        "executor": job.executor,
        "attempt": job.attempt,
        "micro_tokens": job.micro_tokens or job.spec.micro_tokens,
        "step": job.step,
        "steps": job.spec.steps,
        "loss": job.loss,
        "valid_loss": job.valid_loss,
        "tokens_per_second": job.tokens_per_second,
        "started_at": job.started_at,
        "result": job.result,
        "sweep": [candidate.model_dump(mode="json") for candidate in job.sweep],
    }


def _estimated_finish(job: JobRecord, now: float) -> int | None:
    """When a running job will end at its current speed; None: unknown.

    The time since its start is only used if the speed is unknown, since the job may have been paused or restarted.
    """
    if job.status is not JobStatus.RUNNING or not job.step or not job.started_at:
        return None
    done, steps = job.step, job.spec.steps
    if job.sweep:
        done, steps = sum(each.step for each in job.sweep), trained_steps(len(job.sweep), steps)
    left = max(0, steps - done)
    if job.tokens_per_second:
        return int(now + left * (job.trained_tokens / done) / job.tokens_per_second)
    return int(now + left * (now - job.started_at) / done)


def event_object(event: JobEvent) -> dict[str, Any]:
    """Returns an event object."""
    return {
        "id": f"{EVENT_PREFIX}{event.id}",
        "object": "fine_tuning.job.event",
        "created_at": int(event.created_at),
        "level": event.level,
        "message": event.message,
        "type": event.kind,
        "data": event.data,
    }


def event_number(event_id: str) -> int:
    """Returns the number in an event's ID."""
    return int(event_id.removeprefix(EVENT_PREFIX))


def checkpoint_object(checkpoint: CheckpointRecord, job: JobRecord) -> dict[str, Any]:
    """Returns a checkpoint object."""
    return {
        "id": checkpoint.id,
        "object": "fine_tuning.job.checkpoint",
        "created_at": int(checkpoint.created_at),
        "fine_tuning_job_id": job.id,
        "fine_tuned_model_checkpoint": job.spec.adapter_name.at(checkpoint.version) if checkpoint.version else "",
        "step_number": checkpoint.step,
        "metrics": {"step": checkpoint.step, **checkpoint.metrics},
    }
