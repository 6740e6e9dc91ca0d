"""LoRA, rsLoRA, LoRA+ and DoRA: the adapters that begin with nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from loramill.jobs.train.methods import peft_folder
from loramill.jobs.train.methods.adapted_model import AdaptedModel
from loramill.jobs.train.methods.layers import DoraLinear, LoraLinear
from loramill.jobs.train.methods.peft_folder import StoredAdapter
from loramill.jobs.train.methods.seeds import seed_of
from loramill.jobs.train.methods.targets import TargetModule
from loramill.models.targets import scale_of
from loramill.types import JobSpec


def lora_layers(targets: list[TargetModule], spec: JobSpec) -> dict[str, LoraLinear]:
    """The layers of LoRA and rsLoRA, by name of their place."""
    return {place.name: LoraLinear(place, *initial_factors(place, spec), spec.dropout) for place in targets}


def dora_layers(targets: list[TargetModule], spec: JobSpec) -> dict[str, LoraLinear]:
    """The layers of DoRA, by name of their place."""
    return {place.name: DoraLinear(place, *initial_factors(place, spec), spec.dropout) for place in targets}


def initial_factors(target: TargetModule, spec: JobSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B, fp32, as PEFT begins: A uniform within 1 / sqrt(d_in), B zero. A function of the seed and the name."""
    d_out, d_in = target.shape
    generator = torch.Generator().manual_seed(seed_of(spec.seed, "layers", target.name))
    bound = 1 / math.sqrt(d_in)
    a = torch.empty(target.rank, d_in).uniform_(-bound, bound, generator=generator)
    return a.to(target.device), torch.zeros(d_out, target.rank, device=target.device)


def loraplus_factors(spec: JobSpec, weights: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """LoRA+ (Hayou et al. 2024, 2402.12354, section 4): B learns faster than A."""
    ratio = spec.loraplus_lr_ratio
    return {} if ratio == 1 else {name: ratio for name in weights if name.endswith(peft_folder.B)}


def lora_files(
    spec: JobSpec, weights: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor], base: str
) -> dict[str, bytes]:
    """The adapter as it is trained."""
    return peft_folder.peft_files(spec, weights, base)


def load_lora(adapted: AdaptedModel, stored: StoredAdapter, spec: JobSpec) -> None:
    """Continues from such files, in place.

    Raises:
        AdapterInvalid: their method, targets, ranks or scales are others.
    """
    scales = {module: scale_of(spec, module) for module in peft_folder.modules_of(adapted.weights)}
    peft_folder.check_same(stored, {name: weight.shape for name, weight in adapted.weights.items()}, scales)
    for name, weight in adapted.weights.items():
        weight.copy_(stored.tensors[name])
