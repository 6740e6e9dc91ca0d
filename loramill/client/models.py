"""Objects that the client returns.

Tenants, keys, versions and aliases are those of `loramill.types`; here are the objects whose form in the API differs.
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
    FeedbackRecord,
    FrozenModel,
    JobStatus,
    KeyRecord,
    PendingAction,
    RolloutState,
    SweepCandidate,
    TenantRecord,
    VersionRecord,
)

_V = TypeVar("_V", bound=FrozenModel)


def parse_object(cls: type[_V], wire: Mapping[str, Any]) -> _V:
    """Parses an object of the gateway; unknown fields are ignored.

    Raises:
        NotRunning: A required field is missing, so the response is not loramill's.
    """
    try:
        return cls.model_validate(wire, extra="ignore")
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise NotRunning(
            f"The gateway's response is not a valid {cls.__name__} ('{where}'): "
            "another program listens there, or a loramill of another version."
        ) from error


class NewKey(KeyRecord):
    """A new API key; `key` is the secret and can't be read again."""

    key: str = Field(repr=False)


class CreatedTenant(TenantRecord):
    """One tenant of `client.tenants.create_many`.

    Attributes:
        new: Whether the tenant was created by this request.
        key_id: Id of its new API key, if one was requested.
        key: The key itself, which can't be read again.
    """

    new: bool
    key_id: str | None = None
    key: str | None = Field(default=None, repr=False)


class File(FrozenModel):
    """An uploaded, validated dataset.

    Attributes:
        reused: After an upload, whether the gateway already had a file with this content.
        format: After an upload, the detected format, such as "TSV, Alpaca (instruction, input, output)".
    """

    id: str
    filename: str
    bytes: int
    created_at: float
    tenant: str | None = None
    examples: int | None = None
    reused: bool = False
    format: str | None = None
    warnings: tuple[str, ...] = ()

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> Self:
        """Parses OpenAI's file object with its `loramill` extension; `status_details` has one warning per line."""
        warnings = tuple(line for line in (wire.get("status_details") or "").split("\n") if line)
        return parse_object(cls, {**wire, **wire.get("loramill", {}), "warnings": warnings})


class PreviewPart(FrozenModel):
    """A piece of an example as the base's chat template renders it, and whether the loss is computed on it."""

    text: str
    supervised: bool


class TokenCounts(FrozenModel):
    """Number of tokens of a file's sequences."""

    min: int
    median: int
    max: int
    total: int


class FileCheck(FrozenModel):
    """Result of `client.files.check`. `preview` is the first example; a preference appears with each of its answers."""

    filename: str
    format: str
    examples: int
    tokens: TokenCounts
    supervised_tokens: int
    kind: Literal["supervised", "preference", "labeled"]
    preview: tuple[PreviewPart, ...]
    warnings: tuple[str, ...] = ()


class Job(FrozenModel):
    """A fine-tune job.

    Attributes:
        model: Name of the result in the API (`tenant/adapter@version`), once the job has succeeded.
        step: Optimizer steps done so far, of `steps`.
        pending_action: Action that was requested but has not been carried out, such as "cancel".
        loss: Latest training loss in nats per token.
        valid_loss: Latest validation loss in nats per token.
        estimated_finish: Expected time of completion at the current speed, in seconds since the epoch.
        waits_for: Condition that prevents a queued job from starting, such as a base that is not served.
        spec: The job's options, frozen at submission.
        sweep: The candidates of a sweep, and how far each is.
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
    sweep: tuple[SweepCandidate, ...] = ()

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> Self:
        """Parses OpenAI's job object with its `loramill` extension."""
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
        """Error of a job that failed or was cancelled; None for any other job."""
        if self.status is JobStatus.CANCELLED:
            return JobCancelled(f"The job {self.id} for {self.adapter} was cancelled.")
        if self.status is JobStatus.FAILED:
            reason = self.error or "the gateway reports no reason; see the job's events."
            return ERROR_BY_CODE.get(self.error_code or "", JobError)(
                f"The job {self.id} for {self.adapter} failed: {reason}"
            )
        return None


class Event(FrozenModel):
    """One entry of a job's history; `data` holds the measurements of a metrics event."""

    id: str
    created_at: float
    level: Literal["info", "warn", "error"]
    kind: Literal["message", "metrics"]
    message: str
    data: dict[str, Any] = Field(default_factory=dict)

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> Self:
        """Parses OpenAI's event object."""
        return parse_object(cls, {**wire, "kind": wire.get("type"), "data": wire.get("data") or {}})


class Checkpoint(FrozenModel):
    """A validated state of a job's weights; `model` is its name in the API while it is kept."""

    id: str
    step: int
    model: str | None
    metrics: dict[str, float]
    created_at: float

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> Self:
        """Parses OpenAI's checkpoint object."""
        own = {"step": wire.get("step_number"), "model": wire.get("fine_tuned_model_checkpoint") or None}
        return parse_object(cls, {**wire, **own})


class MetricPoint(FrozenModel):
    """Measurements of one step of a job: losses in nats per token, accuracies as fractions of the supervised tokens.

    Attributes:
        rewards: Preference tuning: rewards/chosen, rewards/rejected, rewards/margins and rewards/accuracies, and those
            of the validation with the prefix valid_. Losses are then those of the objective.
    """

    step: int
    train_loss: float | None = None
    train_mean_token_accuracy: float | None = None
    valid_loss: float | None = None
    valid_mean_token_accuracy: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    trained_tokens: int | None = None
    tokens_per_second: float | None = None
    rewards: dict[str, float] = Field(default_factory=dict)

    @classmethod
    def from_row(cls, row: Mapping[str, str]) -> Self:
        """Parses a row of a job's results file."""
        cells = {name: cell for name, cell in row.items() if cell}
        rewards = {name: cell for name, cell in cells.items() if "rewards/" in name}
        return cls.model_validate({**{name: cells[name] for name in cells if name not in rewards}, "rewards": rewards})


class SubmittedJob(FrozenModel):
    """One job of `client.jobs.submit_many`.

    Attributes:
        where: Where the job was defined, such as the line of a file.
        new: Whether the job was created by this request; otherwise it existed before.
    """

    where: str
    job: Job
    new: bool


class Adapter(AdapterRecord):
    """An adapter with its versions, the history of its aliases, its evaluations and rollouts, newest first."""

    versions: tuple[VersionRecord, ...] = ()
    history: tuple[AliasChange, ...] = ()
    evaluations: tuple[EvaluationRecord, ...] = ()
    rollouts: tuple[RolloutState, ...] = ()


class AnswerTexts(FrozenModel):
    """A stored request and one of its answers.

    Attributes:
        messages: Messages of a chat completion's request.
        tools: Tools of a chat completion's request.
        prompt: Prompt of a text completion, as text or as token ids.
        answer: A message, or the text of a text completion.
    """

    messages: tuple[dict[str, Any], ...] | None = None
    tools: tuple[dict[str, Any], ...] | None = None
    prompt: str | tuple[int, ...] | None = None
    answer: dict[str, Any] | str


class RatedAnswer(FeedbackRecord):
    """Feedback, with the request and the answer where these were requested."""

    texts: AnswerTexts | None = None
