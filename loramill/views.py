"""What the client hands out where the wire's form differs from the record's.

Tenants, keys, versions and aliases are the records of `loramill.types`; the rest is here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self, TypeVar

from pydantic import Field, ValidationError

from loramill.errors import JobCancelled, JobError, LoramillError, NotRunning
from loramill.types import AdapterRecord, AliasChange, EvaluationRecord, JobStatus, KeyRecord, Value, VersionRecord
from loramill.wire import BY_CODE

_V = TypeVar("_V", bound=Value)


def view(cls: type[_V], wire: Mapping[str, Any]) -> _V:
    """Reads one object of the gateway's; fields that this version doesn't know are passed over.

    Raises:
        NotRunning: the object lacks what it must have, so it isn't a loramill that answered.
    """
    try:
        return cls.model_validate(wire, extra="ignore")
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise NotRunning(
            f"The answer of the gateway isn't a {cls.__name__} ('{where}'): "
            "another program answers there, or a loramill of another version."
        ) from error


class NewKey(KeyRecord):
    """A key just made; `key` is the secret and can't be read again."""

    key: str = Field(repr=False)


class File(Value):
    """An uploaded, validated dataset."""

    id: str
    filename: str
    bytes: int
    created_at: float
    warnings: tuple[str, ...] = ()

    @classmethod
    def read(cls, wire: Mapping[str, Any]) -> Self:
        """Reads OpenAI's file object, whose `status_details` holds a warning a line."""
        return view(cls, {**wire, "warnings": tuple((wire.get("status_details") or "").splitlines())})


class Job(Value):
    """A fine-tune job.

    `model` is the name that asks its result (`tenant/adapter@version`), once it succeeded;
    `step` of `steps` optimizer steps are done; `spec` is what was frozen at submit.
    """

    id: str
    adapter: str
    status: JobStatus
    base: str
    model: str | None = None
    step: int = 0
    steps: int
    attempt: int = 0
    trained_tokens: int | None = None
    error_code: str | None = None
    error: str | None = None
    training_file: str
    validation_file: str | None = None
    seed: int = 0
    metadata: dict[str, str] = Field(default_factory=dict)
    created_at: float
    finished_at: float | None = None
    spec: dict[str, Any] = Field(default_factory=dict)

    @classmethod
    def read(cls, wire: Mapping[str, Any]) -> Self:
        """Reads OpenAI's job object with its `loramill` extension."""
        error = wire.get("error") or {}
        own = {
            "base": wire.get("model"),
            "model": wire.get("fine_tuned_model"),
            "error_code": error.get("code"),
            "error": error.get("message"),
            "metadata": wire.get("metadata") or {},
        }
        return view(cls, {**wire, **wire.get("loramill", {}), **own})

    @property
    def failure(self) -> LoramillError | None:
        """Why there is no result and never will be; None while it runs, and when it succeeded."""
        if self.status is JobStatus.CANCELLED:
            return JobCancelled(f"The job {self.id} for {self.adapter} was cancelled.")
        if self.status is JobStatus.FAILED:
            reason = self.error or "the gateway gives no reason; see its events."
            return BY_CODE.get(self.error_code or "", JobError)(
                f"The job {self.id} for {self.adapter} failed: {reason}"
            )
        return None


class Event(Value):
    """One line of a job's history; `data` holds the numbers of a metrics event."""

    id: str
    created_at: float
    level: Literal["info", "warn", "error"]
    kind: Literal["message", "metrics"]
    message: str
    data: dict[str, Any] = Field(default_factory=dict)

    @classmethod
    def read(cls, wire: Mapping[str, Any]) -> Self:
        """Reads OpenAI's event object."""
        return view(cls, {**wire, "kind": wire.get("type"), "data": wire.get("data") or {}})


class Adapter(AdapterRecord):
    """An adapter with its versions and what became of them, newest first."""

    versions: tuple[VersionRecord, ...] = ()
    history: tuple[AliasChange, ...] = ()
    evaluations: tuple[EvaluationRecord, ...] = ()
