"""LoRA, rsLoRA, LoRA+ and DoRA: adapters that start as zero."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from safetensors.torch import save

from loramill.jobs.train.methods import peft_folder
from loramill.jobs.train.methods.adapted_model import AdaptedModel
from loramill.jobs.train.methods.layers import DoraLinear, LoraLinear
from loramill.jobs.train.methods.peft_folder import StoredAdapter
from loramill.jobs.train.methods.seeds import seed_of
from loramill.jobs.train.methods.targets import TargetModule
from loramill.kernels.peft_folder import GAINS_FILE
from loramill.models.targets import scale_of
from loramill.types import JobSpec

#: Last part of a gain's name in a checkpoint.
GAIN = "gain"


def lora_layers(targets: list[TargetModule], spec: JobSpec) -> dict[str, LoraLinear]:
    """Returns the layers of LoRA and rsLoRA, by name of their target module."""
    return {target.name: LoraLinear(target, *initial_factors(target, spec), spec.dropout) for target in targets}


def dora_layers(targets: list[TargetModule], spec: JobSpec) -> dict[str, LoraLinear]:
    """Returns the layers of DoRA, by name of their target module."""
    return {target.name: DoraLinear(target, *initial_factors(target, spec), spec.dropout) for target in targets}


def initial_factors(target: TargetModule, spec: JobSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns A and B, fp32, as PEFT initializes them: A uniform within 1 / sqrt(d_in), B zero.

    A is a function of the seed and the name.
    """
    d_out, d_in = target.shape
    generator = torch.Generator().manual_seed(seed_of(spec.seed, "layers", target.name))
    bound = 1 / math.sqrt(d_in)
    a = torch.empty(target.rank, d_in).uniform_(-bound, bound, generator=generator)
    return a.to(target.device), torch.zeros(d_out, target.rank, device=target.device)


def loraplus_factors(spec: JobSpec, weights: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Learning-rate factors of LoRA+ (Hayou et al. 2024, 2402.12354, section 4): B has a higher rate than A."""
    ratio = spec.loraplus_lr_ratio
    return {} if ratio == 1 else {name: ratio for name in weights if name.endswith(peft_folder.B)}


def lora_files(
    spec: JobSpec, weights: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor], base: str
) -> dict[str, bytes]:
    """Returns the adapter as it was trained, in PEFT's files; a DoRA with its gains in another file.

    Checkpoints that were written before gains were kept have none; the gains are then computed by each load.
    """
    files = peft_folder.peft_files(spec, weights, base)
    suffix = f".{GAIN}"
    gains = {name.removesuffix(suffix): gain.cpu() for name, gain in sorted(state.items()) if name.endswith(suffix)}
    return files | ({GAINS_FILE: save(gains, metadata={"format": "pt"})} if gains else {})


def gains_of(layers: Mapping[str, LoraLinear]) -> dict[str, torch.Tensor]:
    """Returns the gains of DoRA's layers, under their names in a checkpoint."""
    return {f"{name}.{GAIN}": layer.gain() for name, layer in layers.items() if isinstance(layer, DoraLinear)}


def load_lora(adapted: AdaptedModel, stored: StoredAdapter, spec: JobSpec) -> None:
    """Loads such an adapter into the weights.

    Raises:
        AdapterInvalid: its method, targets, ranks or scales differ from the job's.
    """
    scales = {module: scale_of(spec, module) for module in peft_folder.modules_of(adapted.weights)}
    peft_folder.check_same(stored, {name: weight.shape for name, weight in adapted.weights.items()}, scales)
    for name, weight in adapted.weights.items():
        weight.copy_(stored.tensors[name])
