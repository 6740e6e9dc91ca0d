"""LoRA, rsLoRA, LoRA+ and DoRA: the adapters that begin with nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from loramill.jobs.train.methods import peft_folder
from loramill.jobs.train.methods.adapted_model import Tuned
from loramill.jobs.train.methods.layers import DoraLinear, LoraLinear
from loramill.jobs.train.methods.peft_folder import Stored
from loramill.jobs.train.methods.seeds import seed_of
from loramill.jobs.train.methods.targets import Place, scale_of
from loramill.types import JobSpec


def lora_layers(places: list[Place], spec: JobSpec) -> dict[str, LoraLinear]:
    """The layers of LoRA and rsLoRA, by name of their place."""
    return {place.name: LoraLinear(place, *fresh(place, spec), spec.dropout) for place in places}


def dora_layers(places: list[Place], spec: JobSpec) -> dict[str, LoraLinear]:
    """The layers of DoRA, by name of their place."""
    return {place.name: DoraLinear(place, *fresh(place, spec), spec.dropout) for place in places}


def fresh(place: Place, spec: JobSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B, fp32, as PEFT begins: A uniform within 1 / sqrt(d_in), B zero. A function of the seed and the name."""
    d_out, d_in = place.shape
    generator = torch.Generator().manual_seed(seed_of(spec.seed, "layers", place.name))
    bound = 1 / math.sqrt(d_in)
    a = torch.empty(place.rank, d_in).uniform_(-bound, bound, generator=generator)
    return a.to(place.device), torch.zeros(d_out, place.rank, device=place.device)


def rates(spec: JobSpec, weights: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """LoRA+ (Hayou et al. 2024, 2402.12354, section 4): B learns faster than A."""
    ratio = spec.loraplus_lr_ratio
    return {} if ratio == 1 else {name: ratio for name in weights if name.endswith(peft_folder.B)}


def lora_files(
    spec: JobSpec, weights: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor], base: str
) -> dict[str, bytes]:
    """The adapter as it is trained."""
    return peft_folder.written(spec, weights, base)


def start_lora(tuned: Tuned, stored: Stored, spec: JobSpec) -> None:
    """Continues from such files, in place.

    Raises:
        AdapterInvalid: their method, targets, ranks or scales are others.
    """
    scales = {module: scale_of(spec, module) for module in peft_folder.modules_of(tuned.weights)}
    peft_folder.check_same(stored, {name: weight.shape for name, weight in tuned.weights.items()}, scales)
    for name, weight in tuned.weights.items():
        weight.copy_(stored.tensors[name])
