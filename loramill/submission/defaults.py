"""The meaning of "auto": turns a request for a job into a JobSpec, in which every default is a value.

Pure functions. An option of loramill wins over the hyperparameter of the same meaning (`steps` over `n_epochs`,
`learning_rate` over `learning_rate_multiplier`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import ValidationError

from loramill.errors import InvalidRequest
from loramill.halving import trained_steps
from loramill.models.catalog import EXPERT_ARCHITECTURES, Base
from loramill.submission.objectives import check_objective
from loramill.submission.request import SPEC_TRAIN_ON, Auto, DpoHyperparameters, JobRequest, LoramillOptions
from loramill.types import ATTENTION_TARGETS, JobSpec, Objective, Quantization

_T = TypeVar("_T", int, float)

#: The learning rate of an adapter for a multiplier of 1.
LEARNING_RATE = 1e-3
#: Where every weight is trained: a tenth (Schulman et al. 2025, "LoRA without regret").
FULL_LEARNING_RATE = 1e-4
#: DPO and KTO: a tenth, too; DPO then orders all held-out pairs of a tenant after 10 steps. ORPO learns the answers
#: themselves.
PREFERENCE_LEARNING_RATE = 1e-4
#: Small: 60 steps of 8 learned as much as 50 steps of 16, at about half the price.
BATCH_SIZE = 8
#: For long files, "auto" takes 0.2% of the examples, as OpenAI does, but at most this many.
MAX_BATCH_SIZE = 256
#: The default alpha is the rank times this.
ALPHA_PER_RANK = 2
#: LoRA+'s own choice (Hayou et al. 2024, section 5).
LORAPLUS_LR_RATIO = 16.0
EPOCHS = 3
#: Fewer optimizer steps learn little; "auto" adds no further epoch above the maximum.
MIN_STEPS, MAX_STEPS = 30, 300
MAX_LENGTH = 1024

#: Defaults by method, where they differ from JobSpec's; three names are variants of another method.
METHOD_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "full": {"learning_rate": FULL_LEARNING_RATE},
    "qlora": {"method": "lora"},
    "rslora": {"method": "lora", "rslora": True},
    "lora+": {"method": "lora", "loraplus_lr_ratio": LORAPLUS_LR_RATIO},
}

#: Fields that describe an adapter: a job has those of the job whose version it continues.
_ADAPTER_FIELDS = (
    "method", "rank", "alpha", "rank_pattern", "alpha_pattern", "rslora", "targets", "layers", "init_rank",
)  # fmt: skip

#: Options that are not fields of a spec, or that a spec writes in another form.
_NOT_IN_SPEC = {
    "start_from", "quantization", "method", "targets", "layers", "train_on", "priority", "executor", "sweep",
}  # fmt: skip

_PARAM_OF_FIELD = {
    "steps": "hyperparameters.n_epochs",
    "epochs": "hyperparameters.n_epochs",
    "batch_size": "hyperparameters.batch_size",
    "learning_rate": "hyperparameters.learning_rate_multiplier",
    "beta": "hyperparameters.beta",
}


def resolve_spec(
    request: JobRequest, base: Base, examples: int, start_from: str | None = None, continued: JobSpec | None = None
) -> JobSpec:
    """Chooses a value for every "auto".

    Args:
        request: the job.
        base: its base.
        examples: number of examples in the training file, at least 1.
        start_from: the version that `request.options.start_from` names.
        continued: spec of the job that made that version, whose method, rank, alpha, targets and layers become the
            defaults. None for new weights, and for a version that was imported or whose job was deleted.

    Raises:
        InvalidRequest: a value is out of its range or differs from the version's; `param` names it.
    """
    options = request.options
    check_options(options, base)
    chosen: dict[str, Any] = {
        "base": base.fingerprint,
        "adapter": str(request.adapter),
        "train": request.train,
        "valid": request.valid,
        "start_from": start_from,
        "seed": request.seed,
        "max_length": min(MAX_LENGTH, base.context_length),
    }
    if base.architecture in EXPERT_ARCHITECTURES:
        chosen["targets"] = ATTENTION_TARGETS
    if continued is None:
        chosen |= alpha_defaults(options)
    else:
        chosen |= _adapter_fields(continued, options)
        _check_same_rank_and_scale(options, chosen)
    chosen |= method_defaults(options) | _schedule_defaults(request, examples)
    return validated_spec(chosen, requested_fields(options))


def check_options(options: LoramillOptions, base: Base) -> None:
    """Checks what does not depend on the data.

    Raises:
        InvalidRequest: an option has no meaning for the objective, or does not fit the base.
    """
    check_objective(options)
    _check_quantization(options, base.quantization)
    if (options.max_length or 0) > base.context_length:
        raise InvalidRequest(
            f"'loramill.max_length' is {options.max_length}, and the base reads at most {base.context_length} tokens; "
            "lower it.",
            param="loramill.max_length",
        )


def requested_fields(options: LoramillOptions) -> dict[str, Any]:
    """The fields of a spec that options set."""
    return options.model_dump(exclude_none=True, exclude=_NOT_IN_SPEC) | _in_spec_form(options)


def validated_spec(chosen: Mapping[str, Any], requested: Mapping[str, Any]) -> JobSpec:
    """The spec with these fields; those that were requested win.

    Raises:
        InvalidRequest: a value is out of its range; `param` names it.
    """
    _check_init_rank(requested, requested.get("method", chosen.get("method", "lora")))
    try:
        return JobSpec.model_validate({**chosen, **requested})
    except ValidationError as error:
        problem = error.errors()[0]
        field = str(problem["loc"][0])
        param = f"loramill.{field}" if field in requested else _PARAM_OF_FIELD.get(field, field)
        raise InvalidRequest(f"'{param}': {problem['msg']}.", param=param) from error


def count_steps(epochs: int, examples: int, batch_size: int) -> int:
    """Optimizer steps of `epochs` passes over `examples`; the last batch of a pass may be smaller."""
    # A batch size or a number of epochs below 1 is refused by JobSpec.
    return epochs * -(-examples // max(1, batch_size))


def count_training_tokens(spec: JobSpec, lengths: Sequence[int], examples: int) -> float:
    """Tokens that a job trains on, prompts included; of a sweep, those of all candidates.

    Args:
        spec: the job.
        lengths: tokens of each sequence of the training file.
        examples: number of examples in the training file.
    """
    passes = spec.steps * spec.batch_size / examples if spec.epochs is None else spec.epochs
    trainings = trained_steps(len(spec.trained_specs), spec.steps) / spec.steps
    return passes * trainings * sum(lengths)


def openai_hyperparameters(spec: JobSpec, examples: int | None) -> dict[str, int | float | None]:
    """A spec as OpenAI's hyperparameters, for a job object.

    `n_epochs` is None where the steps do not make whole passes over the training file, or its length isn't known.

    Args:
        spec: the job.
        examples: number of examples in the training file; None if the file was deleted.
    """
    epochs = spec.epochs
    if epochs is None and examples and spec.steps * spec.batch_size % examples == 0:
        epochs = spec.steps * spec.batch_size // examples
    return {
        "n_epochs": epochs,
        "batch_size": spec.batch_size,
        "learning_rate_multiplier": round(spec.learning_rate / _base_learning_rate(spec.method, spec.objective), 6),
    }


def _base_learning_rate(method: str | None, objective: Objective | None) -> float:
    default = PREFERENCE_LEARNING_RATE if objective in ("dpo", "kto") else LEARNING_RATE
    rate: float = METHOD_DEFAULTS.get(method or "", {}).get("learning_rate", default)
    return rate


def _adapter_fields(continued: JobSpec, options: LoramillOptions) -> dict[str, Any]:
    """The fields that describe a job's adapter; that of full fine-tuning is an extracted LoRA with a scale of 1."""
    fields = {name: getattr(continued, name) for name in _ADAPTER_FIELDS}
    if continued.method == "adalora" and options.rank is not None:
        # AdaLoRA continues with another rank, at the same scale.
        ratio = options.rank / continued.rank
        fields["alpha"] = continued.alpha * (math.sqrt(ratio) if continued.rslora else ratio)
    if continued.method == "full":
        fields |= {"method": "lora", "rslora": False, "alpha": continued.rank, "alpha_pattern": continued.rank_pattern}
    return fields


def _check_same_rank_and_scale(options: LoramillOptions, adapter: Mapping[str, Any]) -> None:
    """Refuses another rank, alpha or rslora, which training could not continue with.

    AdaLoRA may change its rank, and full fine-tuning merges the version into the base.
    """
    if (options.method or adapter["method"]) in ("adalora", "full"):
        return
    given = method_defaults(options) | options.model_dump(exclude_none=True, include={"rank", "alpha", "rslora"})
    for name in ("rank", "alpha", "rslora"):
        value = given.get(name)
        if value not in (None, adapter[name]):
            raise InvalidRequest(
                f"'loramill.{name}' is {value}, but the version to continue from has {adapter[name]}: omit it, or omit "
                "'start_from'.",
                param=f"loramill.{name}",
            )


def _check_init_rank(requested: Mapping[str, Any], method: str) -> None:
    """Refuses an initial rank for a method that has none."""
    if "init_rank" in requested and method != "adalora":
        raise InvalidRequest(
            f"'loramill.init_rank' is the rank that AdaLoRA prunes, and the method is '{method}': omit it, or set "
            "'method' to 'adalora'.",
            param="loramill.init_rank",
        )


def method_defaults(options: LoramillOptions) -> dict[str, Any]:
    """What the method of a request implies; nothing without one."""
    if options.method is None:
        return {}
    return {"method": options.method, **METHOD_DEFAULTS.get(options.method, {})}


def _schedule_defaults(request: JobRequest, examples: int) -> dict[str, Any]:
    """Batch size, steps, learning rate and checkpoints, from the hyperparameters and the number of examples."""
    hyperparameters, options = request.hyperparameters, request.options
    batch_size = _or_default(hyperparameters.batch_size, _default_batch_size(examples))
    epochs = _or_default(hyperparameters.n_epochs, default_epochs(examples, batch_size))
    steps = count_steps(epochs, examples, batch_size)
    multiplier = _or_default(hyperparameters.learning_rate_multiplier, 1.0)
    beta = hyperparameters.beta if isinstance(hyperparameters, DpoHyperparameters) else "auto"
    return {
        **({} if beta == "auto" else {"beta": beta}),
        "batch_size": batch_size,
        "steps": steps,
        "epochs": epochs if options.steps is None else None,
        "learning_rate": _base_learning_rate(options.method, options.objective) * multiplier,
        # A checkpoint, with its validation, costs as much as a few steps; a crash costs the steps since the last one.
        "checkpoint_every": max(10, min(100, (steps if options.steps is None else options.steps) // 4)),
    }


def _or_default(value: _T | Auto, default: _T) -> _T:
    return default if value == "auto" else value


def _default_batch_size(examples: int) -> int:
    return min(max(1, min(BATCH_SIZE, examples // 4), examples // 500), MAX_BATCH_SIZE)


def default_epochs(examples: int, batch_size: int) -> int:
    """As many as make MIN_STEPS to MAX_STEPS steps, but at least one."""
    steps = count_steps(1, examples, batch_size)
    return min(max(EPOCHS, -(-MIN_STEPS // steps)), max(1, MAX_STEPS // steps))


def alpha_defaults(options: LoramillOptions) -> dict[str, Any]:
    """Alphas for the ranks in the request, where it has no alpha."""
    if options.alpha is not None:
        return {}
    alphas: dict[str, Any] = {}
    if options.rank is not None:
        alphas["alpha"] = ALPHA_PER_RANK * options.rank
    if options.rank_pattern and options.alpha_pattern is None:
        alphas["alpha_pattern"] = {name: ALPHA_PER_RANK * rank for name, rank in options.rank_pattern.items()}
    return alphas


def _check_quantization(options: LoramillOptions, quantization: Quantization) -> None:
    """Checks that the base is served in the bits that the job needs.

    Raises:
        InvalidRequest: the job or its method needs another quantization.
    """
    required = options.quantization or ("nf4" if options.method == "qlora" else None)
    if required not in (None, quantization):
        raise InvalidRequest(
            f"The base is served with quantization '{quantization}', and an adapter is trained on the same weights "
            f"that it is served with: omit 'quantization', or set the setting quantization to '{required}'.",
            param="loramill.quantization" if options.quantization else "loramill.method",
        )
    if options.method == "loftq" and quantization == "none":
        raise InvalidRequest(
            "LoftQ starts from the quantization error of the base, and this base is served without quantization: use "
            "'lora' or 'pissa', or set the setting quantization to 'nf4'.",
            param="loramill.method",
        )


def _in_spec_form(options: LoramillOptions) -> dict[str, Any]:
    """Targets and layers as tuples, and `train_on` in the spec's words."""
    fields: dict[str, Any] = {}
    if options.targets is not None:
        fields["targets"] = (options.targets,) if isinstance(options.targets, str) else options.targets
    if options.layers is not None:
        fields["layers"] = _parse_layers(options.layers) if isinstance(options.layers, str) else options.layers
    if options.train_on is not None:
        fields["train_on"] = SPEC_TRAIN_ON[options.train_on]
    return fields


#: Of few digits: a range is written out, and no base has a million layers.
_RANGE = re.compile(r"([0-9]{1,4})(?:-([0-9]{1,4}))?")


def _parse_layers(text: str) -> tuple[int, ...]:
    """Reads "0-7,20" as the indices of layers."""
    layers: set[int] = set()
    for part in text.split(","):
        found = _RANGE.fullmatch(part.strip())
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, -1)
        if last < first:
            raise InvalidRequest(
                f"'loramill.layers': '{part}' is not an index or a range of layers; write for instance 0-7,20.",
                param="loramill.layers",
            )
        layers.update(range(first, last + 1))
    return tuple(sorted(layers))
