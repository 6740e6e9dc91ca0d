"""The linears of a base that a job adapts: number of trained weights, and tensors saved for the backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loramill.errors import InvalidRequest
from loramill.models.catalog import Base
from loramill.models.targets import find_targets, rank_of
from loramill.sizing.anatomy import Anatomy, LinearShape, anatomy, linears, read_config
from loramill.types import ATTENTION_TARGETS, JobSpec

#: Names of the parts of experts.
_OF_EXPERTS = ("gate_proj", "up_proj", "down_proj", "gate_up_proj", "gate")
#: Linears that have the same input as another linear of their layer.
_SAME_INPUT = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}


@dataclass(frozen=True, slots=True)
class TrainedElements:
    """What a job trains on a base, in numbers of elements.

    Attributes:
        weights: trained weights.
        frozen: weights of the adapter that are not trained.
        extra_state: numbers per weight that the method keeps in addition to the optimizer.
        gradients: elements of the gradients; PiSSA's of A are half of a gradient that is as large as A and A0.
        first_layer: the lowest adapted layer; those below save nothing.
        saved, max_layer_saved: elements per token that the adapted linears save, in all layers and in one layer at
            most, without the input of Llama's o_proj.
        attention_outputs: number of layers in which that input is saved.
        cast, max_layer_cast: elements that they save per pass: A and B in the base's dtype.
        inputs: the inputs that they save, each with its layer, the first linear that takes it, and its elements per
            token; `saved` contains them. Adapters that share a pass share them.
        attended_layers: the layers that `attention_outputs` counts.
    """

    weights: int
    frozen: int
    extra_state: int
    gradients: int
    first_layer: int
    saved: int
    max_layer_saved: int
    attention_outputs: int
    cast: int
    max_layer_cast: int
    inputs: frozenset[tuple[int, str, int]] = frozenset()
    attended_layers: frozenset[int] = frozenset()


def trained_elements(spec: JobSpec, base: Anatomy) -> TrainedElements:
    """What a job trains, and what its adapted linears save.

    Raises:
        InvalidRequest: a target, layer or pattern matches nothing.
    """
    weights = fixed = gradients = 0
    attended: set[int] = set()
    kept: dict[int, int] = {}
    copied: dict[int, int] = {}
    inputs: dict[tuple[int, str], int] = {}
    for linear, rank in adapted_linears(spec, base.linears):
        own = rank * (linear.d_in + linear.d_out)
        halves = 2 if spec.method == "pissa" else 1
        gain = linear.d_out if spec.method == "dora" else 0
        source = (linear.layer, _SAME_INPUT.get(linear.suffix, linear.suffix) if base.llama_like else linear.name)
        output = base.llama_like and linear.suffix == "o_proj"
        entering = 0 if source in inputs or output else linear.d_in
        if output:
            attended.add(linear.layer)
        elif entering:
            inputs[source] = entering
        trained = own + gain + (rank if spec.method == "adalora" else 0)
        weights += trained
        gradients += trained + (halves - 1) * rank * linear.d_in
        fixed += (halves - 1) * own
        kept[linear.layer] = kept.get(linear.layer, 0) + entering + halves * rank + gain
        copied[linear.layer] = copied.get(linear.layer, 0) + halves * own
    return TrainedElements(
        weights=weights,
        frozen=fixed,
        extra_state=2 if spec.method == "adalora" else 0,
        gradients=gradients,
        first_layer=min(kept),
        saved=sum(kept.values()),
        max_layer_saved=max(kept.values()),
        attention_outputs=len(attended),
        cast=sum(copied.values()),
        max_layer_cast=max(copied.values()),
        inputs=frozenset((layer, name, elements) for (layer, name), elements in inputs.items()),
        attended_layers=frozenset(attended),
    )


def check_targets(spec: JobSpec, base: Base) -> None:
    """Checks that every target, layer and pattern of a job matches something in its base.

    Raises:
        InvalidRequest: one matches nothing; `param` is loramill.targets, .layers, .rank_pattern or .alpha_pattern. Or
            the job would train the experts of a mixture.
    """
    config = read_config(str(base.folder))
    if anatomy(config).experts is not None:
        refuse_experts(spec)
    adapted_linears(spec, linears(config))


def refuse_experts(spec: JobSpec) -> None:
    """Checks that a job on a mixture of experts trains no expert.

    Raises:
        InvalidRequest: it would; `param` is loramill.method or .targets.
    """
    if spec.method == "full":
        raise InvalidRequest(
            "The base is a mixture of experts, whose experts stay frozen: 'full' would train them. Use 'lora'.",
            param="loramill.method",
        )
    found = [target for target in spec.targets if "expert" in target or target.rpartition(".")[2] in _OF_EXPERTS]
    if found:
        raise InvalidRequest(
            f"The base is a mixture of experts, which stay frozen, so that {', '.join(found)} can't be adapted: leave "
            f"'targets' out, or give some of {', '.join(ATTENTION_TARGETS)}.",
            param="loramill.targets",
        )


def adapted_linears(spec: JobSpec, linears: Sequence[LinearShape]) -> list[tuple[LinearShape, int]]:
    """The linears that get an adapter, each with its rank; for AdaLoRA that is the rank before pruning.

    Raises:
        InvalidRequest: as `loramill.models.targets.find_targets`.
    """
    by_name = {linear.name: linear for linear in linears}
    adalora_rank = spec.init_rank or -(-3 * spec.rank // 2) if spec.method == "adalora" else None
    return [(by_name[name], adalora_rank or rank_of(spec, name)) for name in find_targets(spec, list(by_name))]
