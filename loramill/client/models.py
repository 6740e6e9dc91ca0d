"""What the client hands out where the wire's form differs from the record's.

Tenants, keys, versions and aliases are the records of `loramill.types`; the rest is here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self, TypeVar

from pydantic import Field, ValidationError

from loramill.client.http import ERROR_BY_CODE
from loramill.errors import JobCancelled, JobError, LoramillError, NotRunning
from loramill.types import (
    AdapterRecord,
    AliasChange,
    EvaluationRecord,
    Executor,
    FrozenModel,
    JobStatus,
    KeyRecord,
    PendingAction,
    TenantRecord,
    VersionRecord,
)

_V = TypeVar("_V", bound=FrozenModel)


def parse_object(cls: type[_V], wire: Mapping[str, Any]) -> _V:
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


class CreatedTenant(TenantRecord):
    """A tenant of a request for many: whether it is new, and its key, shown this once, if one was made."""

    new: bool
    key_id: str | None = None
    key: str | None = Field(default=None, repr=False)


class File(FrozenModel):
    """An uploaded, validated dataset.

    After an upload, `reused` says whether the gateway had a file of this content, and `recognized` what the source was
    read as, such as "TSV, Alpaca (instruction, input, output)".
    """

    id: str
    filename: str
    bytes: int
    created_at: float
    tenant: str | None = None
    examples: int | None = None
    reused: bool = False
    recognized: str | None = None
    warnings: tuple[str, ...] = ()

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> Self:
        """Reads OpenAI's file object with its `loramill` extension; `status_details` has one warning per line."""
        warnings = tuple(line for line in (wire.get("status_details") or "").split("\n") if line)
        return parse_object(cls, {**wire, **wire.get("loramill", {}), "warnings": warnings})


class PreviewPart(FrozenModel):
    """A part of an example as the base's chat template renders it, and whether the loss is computed on it."""

    text: str
    supervised: bool


class TokenCounts(FrozenModel):
    """Tokens of a file's sequences."""

    min: int
    median: int
    max: int
    total: int


class FileCheck(FrozenModel):
    """What would be trained from a source, which was not stored. `preview` is its first example."""

    filename: str
    recognized: str
    examples: int
    tokens: TokenCounts
    supervised_tokens: int
    preview: tuple[PreviewPart, ...]
    warnings: tuple[str, ...] = ()


class Job(FrozenModel):
    """A fine-tune job.

    `model` is the name that asks its result (`tenant/adapter@version`), once it succeeded;
    `step` of `steps` optimizer steps are done; `spec` is what was frozen at submit. Losses are in nats a token,
    the last that are known; `estimated_finish` is when it will be done if it goes on as it does; `waits_for` is what
    keeps a queued job from starting at all, such as a base that is not served.
    """

    id: str
    adapter: str
    status: JobStatus
    base: str
    model: str | None = None
    step: int = 0
    steps: int
    attempt: int = 0
    pending_action: PendingAction | None = None
    priority: int = 0
    executor: Executor = "session"
    micro_tokens: int | None = None
    trained_tokens: int | None = None
    loss: float | None = None
    valid_loss: float | None = None
    tokens_per_second: float | None = None
    error_code: str | None = None
    error: str | None = None
    training_file: str
    validation_file: str | None = None
    seed: int = 0
    metadata: dict[str, str] = Field(default_factory=dict)
    created_at: float
    started_at: float | None = None
    finished_at: float | None = None
    estimated_finish: float | None = None
    waits_for: str | None = None
    spec: dict[str, Any] = Field(default_factory=dict)

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> Self:
        """Reads OpenAI's job object with its `loramill` extension."""
        error = wire.get("error") or {}
        own = {
            "base": wire.get("model"),
            "model": wire.get("fine_tuned_model"),
            "error_code": error.get("code"),
            "error": error.get("message"),
            "metadata": wire.get("metadata") or {},
        }
        return parse_object(cls, {**wire, **wire.get("loramill", {}), **own})

    @property
    def failure(self) -> LoramillError | None:
        """Why there is no result and never will be; None while it runs, and when it succeeded."""
        if self.status is JobStatus.CANCELLED:
            return JobCancelled(f"The job {self.id} for {self.adapter} was cancelled.")
        if self.status is JobStatus.FAILED:
            reason = self.error or "the gateway gives no reason; see its events."
            return ERROR_BY_CODE.get(self.error_code or "", JobError)(
                f"The job {self.id} for {self.adapter} failed: {reason}"
            )
        return None


class Event(FrozenModel):
    """One line of a job's history; `data` holds the numbers of a metrics event."""

    id: str
    created_at: float
    level: Literal["info", "warn", "error"]
    kind: Literal["message", "metrics"]
    message: str
    data: dict[str, Any] = Field(default_factory=dict)

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> Self:
        """Reads OpenAI's event object."""
        return parse_object(cls, {**wire, "kind": wire.get("type"), "data": wire.get("data") or {}})


class Checkpoint(FrozenModel):
    """Where a job's weights were validated; `model` asks them, while they are kept."""

    id: str
    step: int
    model: str | None
    metrics: dict[str, float]
    created_at: float

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> Self:
        """Reads OpenAI's checkpoint object."""
        own = {"step": wire.get("step_number"), "model": wire.get("fine_tuned_model_checkpoint") or None}
        return parse_object(cls, {**wire, **own})


class MetricPoint(FrozenModel):
    """What was measured at one step of a job; losses are in nats a token, accuracies are shares of learnt tokens."""

    step: int
    train_loss: float | None = None
    train_mean_token_accuracy: float | None = None
    valid_loss: float | None = None
    valid_mean_token_accuracy: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    trained_tokens: int | None = None
    tokens_per_second: float | None = None


class SubmittedJob(FrozenModel):
    """What became of one job of many: `where` it was asked for, and whether it is `new` or was there before."""

    where: str
    job: Job
    new: bool


class Adapter(AdapterRecord):
    """An adapter with its versions and what became of them, newest first."""

    versions: tuple[VersionRecord, ...] = ()
    history: tuple[AliasChange, ...] = ()
    evaluations: tuple[EvaluationRecord, ...] = ()
