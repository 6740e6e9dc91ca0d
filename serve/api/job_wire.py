"""Fine-tune jobs and their events as OpenAI writes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from loramill.bases import Base
from loramill.errors import InvalidRequest
from loramill.names import SHORT
from loramill.recipe import Extension, Hyperparameters, hyperparameters_of
from loramill.serve.api.wire import Body, Metadata
from loramill.types import JobEvent, JobRecord, JobStatus

#: An event's id on the wire begins so; its number follows.
EVENT = "ftevent-"


class Supervised(Body):
    """How supervised training goes."""

    hyperparameters: Hyperparameters | None = None


class Method(Body):
    """OpenAI's method; only supervised training is there."""

    type: Literal["supervised"]
    supervised: Supervised | None = None


class NewJob(Body):
    """OpenAI's request for a job, with loramill's own fields under `loramill`."""

    asks_nothing: ClassVar[Mapping[str, Sequence[Any]]] = {"integrations": ([],)}
    model: str
    training_file: str
    validation_file: str | None = None
    suffix: str = "default"
    seed: int = Field(default=0, ge=0, lt=2**32)
    metadata: Metadata = Field(default={})
    method: Method | None = None
    hyperparameters: Hyperparameters | None = None
    loramill: Extension = Extension()

    def asked(self) -> Hyperparameters:
        """The hyperparameters, wherever they stand.

        Raises:
            InvalidRequest: they stand in both places and differ.
        """
        supervised = self.method.supervised if self.method else None
        newer = supervised.hyperparameters if supervised else None
        if newer and self.hyperparameters and newer != self.hyperparameters:
            raise InvalidRequest(
                "'hyperparameters' and those of 'method' differ; give one of them.", param="hyperparameters"
            )
        return newer or self.hyperparameters or Hyperparameters()


def job_object(job: JobRecord, base: Base, examples: int) -> dict[str, Any]:
    """A job; `base` is what the gateway serves, `examples` is the length of the job's training file."""
    spec, hyperparameters = job.spec, hyperparameters_of(job.spec, examples)
    failed = job.status is JobStatus.FAILED
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "created_at": int(job.created_at),
        "finished_at": int(job.finished_at) if job.finished_at else None,
        "estimated_finish": None,
        "model": base.name if spec.base == base.fingerprint else spec.base[:SHORT],
        "fine_tuned_model": spec.adapter_name.at(job.version) if job.version else None,
        "organization_id": job.tenant,
        "status": job.status,
        "error": {"code": job.error_code, "message": job.error_message, "param": None} if failed else None,
        "hyperparameters": hyperparameters,
        "method": {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
        "training_file": spec.train,
        "validation_file": spec.valid,
        "result_files": [],
        "trained_tokens": job.trained_tokens,
        "seed": spec.seed,
        "metadata": job.metadata,
        "loramill": {
            "adapter": spec.adapter,
            "spec": spec.model_dump(mode="json"),
            "step": job.step,
            "steps": spec.steps,
            "attempt": job.attempt,
        },
    }


def event_object(event: JobEvent) -> dict[str, Any]:
    """A line of a job's history."""
    return {
        "id": f"{EVENT}{event.id}",
        "object": "fine_tuning.job.event",
        "created_at": int(event.created_at),
        "level": event.level,
        "message": event.message,
        "type": event.kind,
        "data": event.data,
    }


def event_number(event_id: str) -> int:
    """The number in an event's id.

    Raises:
        InvalidRequest: it is no event's id.
    """
    number = event_id.removeprefix(EVENT)
    if not (number.isascii() and number.isdecimal()):
        raise InvalidRequest(f"'{event_id}' is no id of an event.", param="after")
    return int(number)
