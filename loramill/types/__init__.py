"""The vocabulary: frozen values that cross between the rooms.

Times are seconds since the epoch (UTC). Ids carry their kind in a prefix, as OpenAI's do
(`file-…`, `ftjob-…`, `key-…`); versions, artifacts and bases are identified by a sha256 in hex.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator

from loramill.names import AdapterName


class FrozenModel(BaseModel):
    """A frozen value; unknown fields are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", from_attributes=True)


class JobStatus(StrEnum):
    """States of a fine-tune job: OpenAI's, and `paused`."""

    VALIDATING = "validating_files"
    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def final(self) -> bool:
        """Whether a job in this state changes no more, unless it is retried."""
        return self in (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED)


class Alias(StrEnum):
    """The names that move between an adapter's versions."""

    CHAMPION = "champion"
    CHALLENGER = "challenger"
    PREVIOUS = "previous"


#: The linears of a Llama-like layer, which a job adapts unless it says otherwise.
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
#: Stands alone among a job's targets: every linear of the base's layers, whatever they are called.
ALL_LINEAR = "all-linear"

Method = Literal["lora", "dora", "adalora", "pissa", "loftq", "full"]
METHODS: tuple[Method, ...] = get_args(Method)
Schedule = Literal["linear", "cosine", "constant"]
TrainOn = Literal["all", "only_last", "last"]
Quantization = Literal["none", "int8", "nf4"]


class JobSpec(FrozenModel):
    """One fine-tune job, frozen at submission: every "auto" is already a value.

    The API's schema, the CLI's help and the docs show these descriptions.
    """

    base: str = Field(description="Fingerprint of the base, which includes its quantization.")
    adapter: str = Field(description="The adapter (`tenant/adapter`) that gets the new version.")
    train: str = Field(description="Id of the training dataset.")
    valid: str | None = Field(default=None, description="Id of the validation dataset.")
    start_from: str | None = Field(
        default=None, description="Version whose weights training starts from; null: new weights."
    )

    method: Method = Field(default="lora", description="How the base is adapted.")
    rank: int = Field(
        default=16,
        ge=1,
        le=256,
        description="Rank of each adapted linear. AdaLoRA: the mean rank after pruning; full: the rank of the "
        "extracted LoRA.",
    )
    alpha: float = Field(default=32.0, gt=0, description="The update is scaled by alpha / rank.")
    rslora: bool = Field(default=False, description="Scale the update by alpha / sqrt(rank) instead.")
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0, description="Dropout probability of the adapter's input.")
    targets: tuple[str, ...] = Field(
        default=TARGETS, min_length=1, description="Linears to adapt: names such as q_proj, or all-linear."
    )
    layers: tuple[int, ...] | None = Field(
        default=None, description="Indices of the layers to adapt; null: all of them."
    )
    rank_pattern: dict[str, int] = Field(
        default={}, description="Other ranks, by the end of a linear's name: down_proj=32, 0.q_proj=4."
    )
    alpha_pattern: dict[str, float] = Field(
        default={}, description="Other alphas, by the end of a linear's name: down_proj=64."
    )
    init_rank: int | None = Field(default=None, ge=1, le=256, description="AdaLoRA: rank before pruning.")
    loraplus_lr_ratio: float = Field(
        default=1.0, gt=0, description="LoRA+: learning rate of B divided by the learning rate of A."
    )

    train_on: TrainOn = Field(
        default="all",
        description="Assistant messages of a conversation to train on. all: those with a weight above 0, as OpenAI "
        "does; only_last: the last one; last (older jobs): the last one, or those with a weight if the file has any.",
    )
    learning_rate: float = Field(default=1e-3, gt=0, description="Learning rate after the warm-up.")
    schedule: Schedule = Field(default="linear", description="Schedule of the learning rate after the warm-up.")
    warmup_ratio: float = Field(default=0.06, ge=0.0, le=1.0, description="Fraction of the steps that warms up.")
    weight_decay: float = Field(default=0.0, ge=0.0, description="Weight decay of AdamW.")
    max_grad_norm: float = Field(default=1.0, gt=0, description="Norm to which gradients are clipped.")
    steps: int = Field(ge=1, le=1_000_000, description="Number of optimizer steps.")
    epochs: int | None = Field(
        default=None,
        ge=1,
        description="Passes over the training file, whose last batch may be smaller; null: every batch is full.",
    )
    batch_size: int = Field(ge=1, le=4096, description="Examples per optimizer step.")
    max_length: int = Field(
        default=1024, ge=8, description="Maximum tokens per example; a file with a longer one is refused."
    )
    packing: bool = Field(
        default=True, description="Pack examples into rows without padding, which gives the same result."
    )
    micro_tokens: int = Field(
        default=256,
        ge=1,
        description="Tokens per forward pass, but at least one example; gradients are accumulated over passes.",
    )
    gradient_checkpointing: bool = Field(
        default=False, description="Recompute activations in the backward pass instead of keeping them."
    )
    offload: Literal["none", "optimizer", "all"] = Field(
        default="none", description="Full fine-tuning: what is kept in host memory."
    )
    gpus: int = Field(default=1, ge=1, le=64, description="Number of GPUs that share the examples of a step.")
    seed: int = Field(default=0, description="Random seed.")

    checkpoint_every: int = Field(default=10, ge=1, description="Optimizer steps between checkpoints.")
    eval_every: int | None = Field(default=None, ge=1, description="Optimizer steps between validations.")
    patience: int | None = Field(
        default=None, ge=1, description="Validations without improvement before training stops early."
    )
    keep: Literal["best", "last"] = Field(
        default="best",
        description="Weights that become the version: those of the lowest validation loss, or the last.",
    )

    @property
    def adapter_name(self) -> AdapterName:
        """The adapter as a parsed name."""
        return AdapterName.parse(self.adapter)


#: What an owner or the scheduler may ask of a running job; "preempt" queues it again, for one of a higher priority.
PendingAction = Literal["cancel", "pause", "preempt"]
#: Who runs a job: a session that takes one after another, or a trainer of its own.
Executor = Literal["session", "dedicated"]


class Scope(StrEnum):
    """What a key may be used for; an admin's key has all, and a tenant's unless it was made with fewer."""

    INFERENCE = "inference"
    TRAINING = "training"
    ADAPTERS = "adapters"
    READ = "read"


class Limits(FrozenModel):
    """What a tenant may use of the gateways, all of them together; None: no limit."""

    requests_per_minute: int | None = Field(default=None, ge=1, lt=2**31)
    tokens_per_minute: int | None = Field(default=None, ge=1, lt=2**53, description="of prompts and of answers")
    concurrent_requests: int | None = Field(default=None, ge=1, lt=2**31, description="generations that run at once")
    stored_bytes: int | None = Field(default=None, ge=0, lt=2**53, description="of uploaded files")


class TenantRecord(Limits):
    """An owner of data, jobs, adapters and keys."""

    id: int
    name: str
    created_at: float
    weight: float = Field(default=1.0, description="share of the pool relative to the other tenants'")
    max_running: int | None = Field(default=None, description="jobs that run at once; None: as many as there is room")
    max_queued: int | None = Field(default=None, description="jobs that may wait; None: any number")
    running: int = Field(default=0, description="jobs that run now")
    waiting: int = Field(default=0, description="jobs that are queued or paused now")


class DeletionSummary(FrozenModel):
    """What was deleted with an adapter, version or tenant."""

    versions: int = 0
    jobs: int = 0
    files: int = 0
    cancelled: tuple[str, ...] = Field(default=(), description="ids of the jobs that had not ended")


class KeyRecord(FrozenModel):
    """An API key as the record knows it: its hash is kept, the secret isn't."""

    id: str
    tenant: str | None = Field(description="None: an admin's key")
    hint: str = Field(description="the secret's last four characters")
    created_at: float
    revoked_at: float | None = None
    expires_at: float | None = Field(default=None, description="from when it is worthless; None: never")
    scopes: tuple[Scope, ...] = tuple(Scope)

    @field_validator("scopes", mode="before")
    @classmethod
    def _split_scopes(cls, value: object) -> object:
        return value.split() if isinstance(value, str) else value  # as the record and OAuth write them


class DatasetRecord(FrozenModel):
    """An immutable, validated snapshot of a tenant's examples."""

    id: str
    tenant: str
    filename: str
    artifact: str
    bytes: int
    examples: int
    created_at: float


class JobRecord(FrozenModel):
    """A fine-tune job and how far it is. `attempt` counts leases and is the fencing token."""

    id: str
    tenant: str
    spec: JobSpec
    status: JobStatus
    attempt: int = 0
    owner: str | None = None
    lease_until: float | None = None
    pending_action: PendingAction | None = Field(
        default=None, description="what a running job was asked to do at its next moment"
    )
    priority: int = 0
    executor: Executor = "session"
    not_before: float | None = Field(default=None, description="when a retry may begin")
    micro_tokens: int | None = Field(default=None, description="instead of the spec's, since memory ran out")
    step: int = 0
    trained_tokens: int = 0
    loss: float | None = Field(default=None, description="of the last step, in nats a token")
    valid_loss: float | None = None
    tokens_per_second: float | None = None
    version: str | None = None
    result: str | None = Field(default=None, description="artifact of a full fine-tune's weights")
    error_code: str | None = None
    error_message: str | None = None
    metadata: dict[str, str] = Field(default_factory=dict)
    created_at: float
    started_at: float | None = None
    finished_at: float | None = None


class JobEvent(FrozenModel):
    """One line of a job's history; `data` holds the numbers of a metrics event."""

    id: int
    job: str
    created_at: float
    level: Literal["info", "warn", "error"]
    kind: Literal["message", "metrics"]
    message: str
    data: dict[str, Any] = Field(default_factory=dict)


class CheckpointRecord(FrozenModel):
    """Where a running job's weights were validated; `version` can be asked until newer checkpoints push it out."""

    id: str
    job: str
    step: int
    version: str | None
    metrics: dict[str, float]
    created_at: float


class VersionRecord(FrozenModel):
    """The immutable result of a job; `id` is the hash of its content, and its artifact's name."""

    id: str
    adapter: str
    job: str | None
    base: str
    bytes: int
    created_at: float


class AliasChange(FrozenModel):
    """One move of an alias; the newest tells where it points."""

    alias: Alias
    version: str | None
    reason: str
    created_at: float


class AdapterRecord(FrozenModel):
    """An adapter with where its aliases point now; while it is `pinned`, its champion stays."""

    name: str
    tenant: str
    created_at: float
    champion: str | None = None
    challenger: str | None = None
    previous: str | None = None
    pinned: bool = False


class EvaluationRecord(FrozenModel):
    """What a model (a version, or the base as None) scored on one slice of held-out examples."""

    id: int
    adapter: str
    version: str | None
    dataset: str
    slice: str
    examples: int
    metrics: dict[str, float]
    created_at: float


class NewData(FrozenModel):
    """What an adapter was given to learn from in one night: ids of datasets, oldest first."""

    adapter: str
    train: tuple[str, ...]
    valid: tuple[str, ...]


class SetAsideData(NewData):
    """Data that a nightly run failed with; it waits until someone retries or drops it."""

    run: str
    stage: str
    reason: str


class NewDataState(FrozenModel):
    """An adapter's new data that no nightly run has collected yet, and what the next one does with it."""

    adapter: str
    examples: int
    validation_examples: int
    enough: bool = Field(description="whether a nightly run trains on it")
    outlook: str = Field(description="what the next nightly run does with it, or how many examples are missing")


class AdapterData(FrozenModel):
    """A training file, and perhaps a validation file, for an adapter's nightly runs.

    `run` is the nightly run that took it, None while it waits; `used_at` is when that run ended. `set_aside` is why the
    run failed with it; no other run takes it until it is retried.
    """

    adapter: str
    train: str
    train_filename: str
    train_examples: int
    valid: str | None
    valid_filename: str | None
    created_at: float
    run: str | None
    used_at: float | None
    set_aside: str | None


class StepStatus(StrEnum):
    """States of one step of a night."""

    PENDING = "pending"
    DONE = "done"
    FAILED = "failed"


class NightlyStep(FrozenModel):
    """One step of a night for one adapter; `result` is what the next step needs."""

    run: str
    adapter: str
    step: str
    status: StepStatus
    result: dict[str, Any] = Field(default_factory=dict)
    finished_at: float | None = None


class NightlyRun(FrozenModel):
    """One nightly run; open while `finished_at` is None."""

    id: str
    created_at: float
    finished_at: float | None = None


class UsageRecord(FrozenModel):
    """What a tenant asked of a base or of a version of an adapter on one day (UTC, as in 2026-01-31)."""

    day: str
    tenant: str | None = Field(description="None: an admin, for no tenant")
    model: str = Field(description="the base's name, or tenant/adapter")
    version: str | None
    requests: int
    prompt_tokens: int
    completion_tokens: int


class AuditRecord(FrozenModel):
    """One change that somebody made through the API."""

    id: str
    created_at: float
    tenant: str | None = Field(description="whose the thing is that changed; None: nobody's")
    actor: str | None = Field(description="the tenant whose key it was; None: an admin's")
    key: str = Field(description="id of the API key, or nightly")
    action: str = Field(description='such as "adapter.promote"')
    subject: str = Field(description="name or id of what changed")
    details: dict[str, Any] = Field(default_factory=dict)
    request: str = Field(description="id of the request, as in x-request-id and the access log, or of the nightly run")


@dataclass(frozen=True, slots=True)
class RateWindow:
    """What one gateway has seen of a tenant in the minute of this number, since the epoch, and in the one before.

    `reserved` are the tokens that the `running` requests may come to; `tokens` those of requests that have ended.
    """

    minute: int
    requests: int = 0
    previous_requests: int = 0
    tokens: int = 0
    previous_tokens: int = 0
    running_requests: int = 0
    reserved_tokens: int = 0
