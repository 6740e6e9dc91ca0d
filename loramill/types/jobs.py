"""Fine-tune jobs: what they do, their status, their history."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Literal, get_args

from pydantic import Field

from loramill.names import AdapterName
from loramill.types.base import FrozenModel
from loramill.types.sweeps import SweepCandidate


class JobStatus(StrEnum):
    """Status of a fine-tune job: OpenAI's values, and `paused`."""

    VALIDATING = "validating_files"
    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def final(self) -> bool:
        """Whether the job has ended; only a retry changes it then."""
        return self in (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED)


#: Linear layers of a Llama-like model: the default targets of a job.
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
#: Those of them in attention: the default targets on a mixture of experts.
ATTENTION_TARGETS = TARGETS[:4]
#: As a job's only target: every linear layer of the base's blocks, whatever its name.
ALL_LINEAR = "all-linear"

Method = Literal["lora", "dora", "adalora", "pissa", "loftq", "full"]
METHODS: tuple[Method, ...] = get_args(Method)
#: What a job optimizes: the likelihood of answers, or preferences between them.
Objective = Literal["sft", "dpo", "orpo", "kto"]
Schedule = Literal["linear", "cosine", "constant"]
TrainOn = Literal["all", "only_last", "last"]
Quantization = Literal["none", "int8", "nf4"]
#: How an engine stores a base's linears: quantized as for training, or in float8 although jobs train on the original.
ServedQuantization = Literal["none", "int8", "nf4", "fp8"]
#: What a running job does at its next heartbeat; "preempt" queues it again in favor of a job of higher priority.
PendingAction = Literal["cancel", "pause", "preempt"]
#: What runs a job: a session that takes one job after another, or a trainer that is started for this job.
Executor = Literal["session", "dedicated"]


class JobSpec(FrozenModel):
    """One fine-tune job, frozen at submission: every "auto" is already a value.

    The API's schema, the CLI's help and the docs show these descriptions.
    """

    base: str = Field(description="Fingerprint of the base, which includes its quantization.")
    adapter: str = Field(description="The adapter (`tenant/adapter`) that gets the new version.")
    train: str = Field(description="ID of the training dataset.")
    valid: str | None = Field(default=None, description="ID of the validation dataset.")
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
    rslora: bool = Field(default=False, description="Scale the update by alpha / sqrt(rank) instead of alpha / rank.")
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

    objective: Objective = Field(
        default="sft",
        description="What training optimizes: sft (answers), dpo or orpo (preferences between two answers), or kto "
        "(answers labeled good or bad).",
    )
    dpo_loss: Literal["sigmoid", "ipo"] = Field(default="sigmoid", description="DPO: form of the loss.")
    beta: float = Field(
        default=0.1,
        gt=0,
        description="DPO and KTO: how strongly the model is kept close to the one that training starts from; IPO: tau; "
        "ORPO: lambda, the weight of the odds ratio.",
    )
    desirable_weight: float = Field(default=1.0, gt=0, description="KTO: weight of the loss of good answers.")
    undesirable_weight: float = Field(default=1.0, gt=0, description="KTO: weight of the loss of bad answers.")

    train_on: TrainOn = Field(
        default="all",
        description="Assistant messages of a conversation to train on. all: those with a weight above 0, as OpenAI "
        "does; only_last: the last one; last (older jobs): the last one, or those with a weight if the file has any.",
    )
    learning_rate: float = Field(default=1e-3, gt=0, description="Learning rate after the warm-up.")
    schedule: Schedule = Field(default="linear", description="Schedule of the learning rate after the warm-up.")
    warmup_ratio: float = Field(
        default=0.06, ge=0.0, le=1.0, description="Length of the warm-up, as a fraction of the steps."
    )
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

    candidates: tuple[dict[str, Any], ...] = Field(
        default=(),
        description="Sweep: for each candidate, the fields in which the candidates differ. The fields above are those "
        "of the first one, and once the job has succeeded those of the best.",
    )

    @property
    def trained_specs(self) -> tuple[JobSpec, ...]:
        """The specs that are trained: those of a sweep's candidates, or else this one."""
        if not self.candidates:
            return (self,)
        common = self.model_dump(exclude={"candidates"})
        return tuple(JobSpec.model_validate(common | values) for values in self.candidates)

    @property
    def adapter_name(self) -> AdapterName:
        """The adapter as a parsed name."""
        return AdapterName.parse(self.adapter)

    @property
    def max_example_tokens(self) -> int:
        """Maximum tokens that one pass needs for an example: a pair has both answers, each with its prompt."""
        return 2 * self.max_length if self.objective in ("dpo", "orpo") else self.max_length


class JobRecord(FrozenModel):
    """A fine-tune job and its progress. `attempt` counts leases and is the fencing token."""

    id: str
    tenant: str
    spec: JobSpec
    status: JobStatus
    attempt: int = 0
    owner: str | None = Field(default=None, description="Worker that holds the lease.")
    lease_until: float | None = None
    pending_action: PendingAction | None = Field(
        default=None, description="What a running job does at its next heartbeat."
    )
    priority: int = 0
    executor: Executor = "session"
    not_before: float | None = Field(default=None, description="Earliest time of a retry.")
    micro_tokens: int | None = Field(default=None, description="Replaces the spec's value after running out of memory.")
    alone: bool = Field(
        default=False,
        description="Whether it needs a session for itself, after shared ones vanished or ran out of memory.",
    )
    step: int = 0
    trained_tokens: int = 0
    loss: float | None = Field(default=None, description="Loss of the last step, in nats per token.")
    valid_loss: float | None = None
    tokens_per_second: float | None = None
    version: str | None = None
    result: str | None = Field(default=None, description="Artifact of the weights of a full fine-tune.")
    error_code: str | None = None
    error_message: str | None = None
    sweep: tuple[SweepCandidate, ...] = Field(default=(), description="The candidates of a sweep.")
    metadata: dict[str, str] = Field(default_factory=dict)
    created_at: float
    started_at: float | None = None
    finished_at: float | None = None


class JobEvent(FrozenModel):
    """One line of a job's history; `data` holds the values of a metrics event."""

    id: int
    job: str
    created_at: float
    level: Literal["info", "warn", "error"]
    kind: Literal["message", "metrics"]
    message: str
    data: dict[str, Any] = Field(default_factory=dict)


class JobAttempt(FrozenModel):
    """A time in which a worker held a job; of an attempt that was interrupted, up to its last metrics."""

    owner: str
    started_at: float
    ended_at: float


class CheckpointRecord(FrozenModel):
    """A validated checkpoint of a job; its `version` can be used as a model until newer checkpoints replace it."""

    id: str
    job: str
    step: int
    version: str | None
    metrics: dict[str, float]
    created_at: float
