"""What "auto" means: turns what a submitter said about training into a JobSpec full of numbers.

Pure functions. `Hyperparameters` are OpenAI's, `Extension` is what loramill adds under its own key;
a field of the extension wins over the hyperparameter that says the same thing (`steps` over `n_epochs`,
`learning_rate` over `learning_rate_multiplier`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, Strict, ValidationError

from loramill.errors import InvalidRequest
from loramill.types import Executor, FrozenModel, JobSpec, Method, Quantization, Schedule

Auto = Literal["auto"]

#: The learning rate that a multiplier of 1 stands for, of adapters.
LEARNING_RATE = 1e-3
#: The same where every weight is trained: a tenth (Schulman et al. 2025, "LoRA without regret").
FULL_LEARNING_RATE = 1e-4
#: Small: what was learned from 50 steps of 16 was learned from 60 of 8, at about half the price.
BATCH_SIZE = 8
#: For long files, "auto" takes 0.2% of the examples, as OpenAI does, but no more than this.
MAX_BATCH_SIZE = 256
#: The default alpha is the rank times this.
ALPHA_PER_RANK = 2
#: LoRA+'s own choice (Hayou et al. 2024, section 5) where the job only names the method.
LORAPLUS_LR_RATIO = 16.0
EPOCHS = 3
#: Optimizer steps below which little is learned, and above which "auto" adds no further epoch.
MIN_STEPS, MAX_STEPS = 30, 300
MAX_LENGTH = 1024


class Hyperparameters(FrozenModel):
    """OpenAI's hyperparameters of a fine-tune job."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)
    n_epochs: int | Auto = Field(default="auto", description="passes over the training file")
    batch_size: int | Auto = Field(default="auto", description="examples a step")
    learning_rate_multiplier: float | Auto = "auto"


class LoramillOptions(FrozenModel):
    """loramill's own fields of a fine-tune job; None leaves the choice to us. JobSpec says what each means.

    `start_from` is an alias or a version of the same adapter, not looked up yet.
    """

    model_config = ConfigDict(strict=True, allow_inf_nan=False)
    method: Method | Literal["rslora", "qlora", "lora+"] | None = None
    quantization: Quantization | None = Field(default=None, description="must be the base's; says so if it isn't")
    rank: int | None = None
    alpha: float | None = None
    rslora: bool | None = None
    dropout: float | None = None
    targets: Annotated[tuple[str, ...], Strict(False)] | str | None = None
    layers: Annotated[tuple[int, ...], Strict(False)] | Annotated[str, Field(max_length=1000)] | None = Field(
        default=None, description='indices, or ranges such as "0-7,20"'
    )
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    init_rank: int | None = None
    loraplus_lr_ratio: float | None = None
    train_on: Literal["last", "all"] | None = Field(
        default=None, description="answers of a conversation that are trained: all whose weight isn't 0, or the last"
    )
    learning_rate: float | None = None
    schedule: Schedule | None = None
    steps: int | None = None
    warmup_ratio: float | None = None
    weight_decay: float | None = None
    max_grad_norm: float | None = None
    max_length: int | None = None
    packing: bool | None = None
    micro_tokens: int | None = None
    gradient_checkpointing: bool | None = None
    offload: Literal["none", "optimizer", "all"] | None = None
    gpus: int | None = None
    checkpoint_every: int | None = None
    eval_every: int | None = None
    patience: int | None = None
    keep: Literal["best", "last"] | None = None
    start_from: str | None = None
    priority: int = Field(default=0, ge=-100, le=100, description="jobs of a higher one go first, and may preempt")
    executor: Executor | None = Field(default=None, description="None: a session, unless the job is long or large")


def resolve_spec(
    *,
    base: str,
    context_length: int,
    adapter: str,
    train: str,
    examples: int,
    valid: str | None = None,
    start_from: str | None = None,
    seed: int = 0,
    quantization: Quantization = "none",
    hyperparameters: Hyperparameters | None = None,
    extension: LoramillOptions | None = None,
) -> JobSpec:
    """Fills in every "auto".

    Args:
        base: the base's fingerprint.
        context_length: tokens that the base can read at once.
        examples: number of examples in the training file, at least 1.
        start_from: the version that `extension.start_from` names, already looked up.
        quantization: the base's.

    Raises:
        InvalidRequest: a value is out of its range; `param` names it.
    """
    asked = hyperparameters or Hyperparameters()
    said = extension or LoramillOptions()
    own = (
        said.model_dump(exclude_none=True, exclude=_NOT_IN_SPEC)
        | _method(said, quantization)
        | _targets_and_layers(said)
    )
    if own.get("max_length", 0) > context_length:
        raise InvalidRequest(
            f"'loramill.max_length' is {own['max_length']}, the base reads {context_length} tokens at most; lower it.",
            param="loramill.max_length",
        )
    batch_size = _auto(asked.batch_size, _batch_size(examples))
    multiplier = 1.0 if asked.learning_rate_multiplier == "auto" else asked.learning_rate_multiplier
    epochs = _auto(asked.n_epochs, _epochs(examples, batch_size))
    steps = count_steps(epochs, examples, batch_size)
    chosen = {
        "batch_size": batch_size,
        "steps": steps,
        "epochs": None if "steps" in own else epochs,
        "learning_rate": _base_learning_rate(said.method) * multiplier,
        "max_length": min(MAX_LENGTH, context_length),
        # A checkpoint, with its validation, costs as much as a few steps; a crash costs those since the last.
        "checkpoint_every": max(10, min(100, own.get("steps", steps) // 4)),
    } | _alphas(said)
    if said.train_on == "last":
        own["train_on"] = "only_last"  # in a spec, "last" keeps its meaning for older jobs
    fields: dict[str, object] = {
        "base": base,
        "adapter": adapter,
        "train": train,
        "valid": valid,
        "start_from": start_from,
        "seed": seed,
    }
    try:
        return JobSpec.model_validate(fields | chosen | own)
    except ValidationError as error:
        problem = error.errors()[0]
        field = str(problem["loc"][0])
        param = f"loramill.{field}" if field in own else _PARAM_OF_FIELD.get(field, field)
        raise InvalidRequest(f"'{param}': {problem['msg']}.", param=param) from error


def count_steps(epochs: int, examples: int, batch_size: int) -> int:
    """Optimizer steps of `epochs` passes over `examples`; the last batch of a pass may be smaller."""
    # A batch size or a number of epochs below 1 reaches JobSpec as it is, and is refused there.
    return epochs * -(-examples // max(1, batch_size))


def count_training_tokens(spec: JobSpec, lengths: Sequence[int], examples: int) -> float:
    """Tokens that a job trains on, prompts included.

    Args:
        lengths: tokens of each sequence of the training file.
        examples: how many the file has.
    """
    passes = spec.steps * spec.batch_size / examples if spec.epochs is None else spec.epochs
    return passes * sum(lengths)


def openai_hyperparameters(spec: JobSpec, examples: int | None) -> dict[str, int | float | None]:
    """A spec in OpenAI's terms, as a job object shows them.

    `n_epochs` is None where the steps do not make whole passes over the training file, or its length isn't known.

    Args:
        examples: how many the training file has; None: it was deleted.
    """
    epochs = spec.epochs
    if epochs is None and examples and spec.steps * spec.batch_size % examples == 0:
        epochs = spec.steps * spec.batch_size // examples
    return {
        "n_epochs": epochs,
        "batch_size": spec.batch_size,
        "learning_rate_multiplier": round(spec.learning_rate / _base_learning_rate(spec.method), 6),
    }


#: What the extension says of the job besides its spec, or in other words than the spec's.
_NOT_IN_SPEC = {"start_from", "quantization", "method", "targets", "layers", "priority", "executor"}

_PARAM_OF_FIELD = {
    "steps": "hyperparameters.n_epochs",
    "epochs": "hyperparameters.n_epochs",
    "batch_size": "hyperparameters.batch_size",
    "learning_rate": "hyperparameters.learning_rate_multiplier",
}


def _base_learning_rate(method: str | None) -> float:
    return FULL_LEARNING_RATE if method == "full" else LEARNING_RATE


def _auto(value: int | Auto, default: int) -> int:
    return default if value == "auto" else value


def _batch_size(examples: int) -> int:
    return min(max(1, min(BATCH_SIZE, examples // 4), examples // 500), MAX_BATCH_SIZE)


def _epochs(examples: int, batch_size: int) -> int:
    """As many as make no fewer steps than MIN_STEPS and no more than MAX_STEPS, but at least one."""
    steps = count_steps(1, examples, batch_size)
    return min(max(EPOCHS, -(-MIN_STEPS // steps)), max(1, MAX_STEPS // steps))


def _alphas(options: LoramillOptions) -> dict[str, object]:
    """Default alphas for the ranks that are given, if no alpha is."""
    if options.alpha is not None:
        return {}
    alphas: dict[str, object] = {}
    if options.rank is not None:
        alphas["alpha"] = ALPHA_PER_RANK * options.rank
    if options.rank_pattern and options.alpha_pattern is None:
        alphas["alpha_pattern"] = {place: ALPHA_PER_RANK * rank for place, rank in options.rank_pattern.items()}
    return alphas


def _method(options: LoramillOptions, quantization: Quantization) -> dict[str, object]:
    """The method's fields; three names are of a method that others are a variant of.

    Raises:
        InvalidRequest: the method needs a base in other bits than the one that is served.
    """
    wanted = options.quantization or ("nf4" if options.method == "qlora" else None)
    if wanted not in (None, quantization):
        raise InvalidRequest(
            f"The base is served with quantization '{quantization}', and an adapter is trained on the very weights "
            f"that it is served with: leave 'quantization' away, or set the setting quantization to '{wanted}'.",
            param="loramill.quantization" if options.quantization else "loramill.method",
        )
    match options.method:
        case None:
            return {}
        case "loftq" if quantization == "none":
            raise InvalidRequest(
                "LoftQ begins with what quantization took from the base, and this base is served with all its bits: "
                "use 'lora' or 'pissa', or set the setting quantization to 'nf4'.",
                param="loramill.method",
            )
        case "qlora":
            return {"method": "lora"}
        case "rslora":
            return {"method": "lora", "rslora": True if options.rslora is None else options.rslora}
        case "lora+":
            return {"method": "lora", "loraplus_lr_ratio": options.loraplus_lr_ratio or LORAPLUS_LR_RATIO}
        case method:
            return {"method": method}


def _targets_and_layers(options: LoramillOptions) -> dict[str, object]:
    """The targets and layers, as tuples."""
    places: dict[str, object] = {}
    if options.targets is not None:
        places["targets"] = (options.targets,) if isinstance(options.targets, str) else options.targets
    if options.layers is not None:
        places["layers"] = _layers(options.layers) if isinstance(options.layers, str) else options.layers
    return places


#: Of few digits: a range is written out, and nothing has a million layers.
_RANGE = re.compile(r"([0-9]{1,4})(?:-([0-9]{1,4}))?")


def _layers(text: str) -> tuple[int, ...]:
    """Reads "0-7,20" as the indices of layers."""
    layers: set[int] = set()
    for part in text.split(","):
        found = _RANGE.fullmatch(part.strip())
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, -1)
        if last < first:
            raise InvalidRequest(
                f"'loramill.layers': '{part}' is no index or range of layers; write for instance 0-7,20.",
                param="loramill.layers",
            )
        layers.update(range(first, last + 1))
    return tuple(sorted(layers))
