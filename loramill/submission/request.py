"""A request for a fine-tune job: OpenAI's hyperparameters and loramill's own options, before defaults are chosen.

`JobSpec` is the source for what a field means; the API's schema, the CLI's help and the docs show these descriptions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, Strict

from loramill.names import AdapterName
from loramill.types import Executor, FrozenModel, JobSpec, Method, Objective, Quantization, Schedule, TrainOn

Auto = Literal["auto"]
RequestedTrainOn = Literal["last", "all"]
#: `train_on` of a request in the words of a spec, where "last" keeps the meaning that it had for older jobs.
SPEC_TRAIN_ON: Mapping[RequestedTrainOn, TrainOn] = {"last": "only_last", "all": "all"}
TRAIN_ON_DESCRIPTION = (
    "Assistant messages of a conversation to train on: all with a weight above 0, or the last one. Default: all."
)


def spec_field(name: str, default: str = "") -> Any:
    """An optional field with JobSpec's description, which ends with the default.

    Args:
        name: of the field in JobSpec.
        default: describes a default that depends on the job, the data or the pool; else JobSpec's own is shown.
    """
    info = JobSpec.model_fields[name]
    if not default and not (info.is_required() or info.default is None or info.default is False or info.default == {}):
        default = "yes" if info.default is True else str(info.default)
    return Field(default=None, description=f"{info.description} Default: {default}." if default else info.description)


class Hyperparameters(FrozenModel):
    """OpenAI's hyperparameters of a fine-tune job."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)
    n_epochs: int | Auto = Field(default="auto", description="Passes over the training file.")
    batch_size: int | Auto = Field(default="auto", description="Examples per optimizer step.")
    learning_rate_multiplier: float | Auto = Field(
        default="auto", description="Factor of the method's default learning rate."
    )


class DpoHyperparameters(Hyperparameters):
    """OpenAI's hyperparameters of preference tuning."""

    beta: float | Auto = Field(default="auto", description=JobSpec.model_fields["beta"].description)


class LoramillOptions(FrozenModel):
    """loramill's own fields of a fine-tune job; the gateway chooses what is null or left out."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)
    method: Method | Literal["rslora", "qlora", "lora+"] | None = spec_field("method")
    quantization: Quantization | None = Field(
        default=None, description="Quantization that the base must be served with; another one is refused."
    )
    rank: int | None = spec_field("rank")
    alpha: float | None = spec_field("alpha", "2 x rank")
    rslora: bool | None = spec_field("rslora")
    dropout: float | None = spec_field("dropout")
    targets: Annotated[tuple[str, ...], Strict(False)] | str | None = spec_field("targets", "all of a Llama layer")
    layers: Annotated[tuple[int, ...], Strict(False)] | Annotated[str, Field(max_length=1000)] | None = Field(
        default=None, description="Layers to adapt: indices, or ranges such as 0-7,20. Default: all."
    )
    rank_pattern: dict[str, int] | None = spec_field("rank_pattern")
    alpha_pattern: dict[str, float] | None = spec_field("alpha_pattern")
    init_rank: int | None = spec_field("init_rank", "1.5 x rank")
    loraplus_lr_ratio: float | None = spec_field("loraplus_lr_ratio")
    objective: Objective | None = spec_field("objective")
    dpo_loss: Literal["sigmoid", "ipo"] | None = spec_field("dpo_loss")
    beta: float | None = spec_field("beta")
    desirable_weight: float | None = spec_field("desirable_weight")
    undesirable_weight: float | None = spec_field("undesirable_weight")
    train_on: RequestedTrainOn | None = Field(default=None, description=TRAIN_ON_DESCRIPTION)
    learning_rate: float | None = spec_field("learning_rate", "0.001; full, dpo and kto: 0.0001")
    schedule: Schedule | None = spec_field("schedule")
    steps: int | None = Field(default=None, description="Number of optimizer steps; overrides the number of epochs.")
    warmup_ratio: float | None = spec_field("warmup_ratio")
    weight_decay: float | None = spec_field("weight_decay")
    max_grad_norm: float | None = spec_field("max_grad_norm")
    max_length: int | None = spec_field("max_length", "1024, or the base's context length if that is smaller")
    packing: bool | None = spec_field("packing")
    micro_tokens: int | None = spec_field("micro_tokens", "the fastest that fits in memory")
    gradient_checkpointing: bool | None = spec_field("gradient_checkpointing", "only if the job doesn't fit without")
    offload: Literal["none", "optimizer", "all"] | None = spec_field("offload", "as little as fits")
    gpus: int | None = spec_field("gpus")
    checkpoint_every: int | None = spec_field("checkpoint_every", "a quarter of the steps, from 10 to 100")
    eval_every: int | None = spec_field("eval_every", "at each checkpoint")
    patience: int | None = spec_field("patience")
    keep: Literal["best", "last"] | None = spec_field("keep")
    sweep: dict[str, list[Any]] | None = Field(
        default=None,
        description="Train a candidate for each combination of these values of options, drop the weak ones early by "
        "their validation loss, and publish the best one's version.",
    )
    start_from: str | None = Field(
        default=None,
        description="Alias (such as champion) or version of the same adapter to continue from, with the method, rank, "
        "alpha, targets and layers of the job that made it by default. Default: new weights.",
    )
    priority: int = Field(
        default=0, ge=-100, le=100, description="Jobs of a higher priority start first, and may preempt. Default: 0."
    )
    executor: Executor | None = Field(
        default=None,
        description="Where the job runs: in a session shared with other jobs, or in a dedicated trainer. Default: a "
        "session, unless the job is long, is a full fine-tune, or uses several GPUs.",
    )


@dataclass(frozen=True, slots=True)
class JobRequest:
    """A request for a job of one adapter.

    Attributes:
        adapter: the adapter that gets a new version.
        train, valid: ids of datasets of the adapter's tenant.
        base: name of the base; None: the one that is served.
        options: loramill's own; an option wins over the hyperparameter of the same meaning.
    """

    adapter: AdapterName
    train: str
    valid: str | None = None
    base: str | None = None
    seed: int = 0
    metadata: Mapping[str, str] = field(default_factory=dict)
    hyperparameters: Hyperparameters = field(default_factory=Hyperparameters)
    options: LoramillOptions = field(default_factory=LoramillOptions)
