"""LoRA layers on a resident base, and the PEFT files they are stored as."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from transformers import PreTrainedModel

from loramill.errors import AdapterInvalid
from loramill.types import JobSpec

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"

# PEFT puts the adapter's name into the parameters' names, and takes it out again in files.
_IN_MEMORY, _IN_FILE = ".default.", "."


def lora_config(spec: JobSpec, base: str | None = None) -> LoraConfig:
    """PEFT's configuration of what `spec` asks for; `base` is the base's name on the wire."""
    return LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        r=spec.rank,
        lora_alpha=int(spec.alpha) if spec.alpha.is_integer() else spec.alpha,
        use_rslora=spec.rslora,
        lora_dropout=spec.dropout,
        target_modules=sorted(spec.targets),
    )


@contextmanager
def attached(model: PreTrainedModel, spec: JobSpec) -> Iterator[PeftModel]:
    """`model` with fresh fp32 LoRA layers, the only parameters with a gradient; afterwards as it was before.

    The layers are a function of the spec's seed, and their dropout is off: see `set_dropout`.

    Raises:
        AdapterInvalid: the base has no layer of the name of a target.
    """
    missing = set(spec.targets) - {name.rpartition(".")[2] for name, _ in model.named_modules()}
    if missing:
        raise AdapterInvalid(
            f"The base ({type(model).__name__}) has no layers named {', '.join(sorted(missing))}: "
            "leave them out of 'targets'.",
            param="targets",
        )
    trained_before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with seeded(model.device, spec.seed, "layers"):
        tuned = get_peft_model(model, lora_config(spec))
    try:
        set_dropout(tuned, on=False)
        yield tuned
    finally:
        tuned.unload()
        for parameter, requires_grad in trained_before:
            parameter.requires_grad_(requires_grad)


@contextmanager
def seeded(device: torch.device, *words: object) -> Iterator[None]:
    """Torch's global generators begin inside where `words` say, and are outside as if nothing had been drawn."""
    seed = int.from_bytes(hashlib.sha256(repr(words).encode()).digest()[:8], "little", signed=True)
    with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device], device_type="cuda"):
        torch.manual_seed(seed)
        yield


def set_dropout(tuned: PeftModel, *, on: bool) -> None:
    """Turns the adapter's own dropout on or off; the base's stays off, as it was served so."""
    for module in tuned.modules():
        if isinstance(module, LoraLayer):
            module.lora_dropout.train(on)


def trainable(tuned: PeftModel) -> dict[str, torch.nn.Parameter]:
    """The adapter's parameters under their names in PEFT's file, sorted."""
    return {
        name.replace(_IN_MEMORY, _IN_FILE): parameter
        for name, parameter in sorted(tuned.named_parameters())
        if parameter.requires_grad
    }


def read_weights(folder: Path, spec: JobSpec, wanted: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of the PEFT folder that training begins from; they must be what `spec` itself would make.

    Raises:
        AdapterInvalid: the folder can't be read, or its rank, targets or scale are others.
    """
    try:
        config = json.loads((folder / CONFIG_FILE).read_bytes())
        weights: dict[str, torch.Tensor] = load_file(folder / WEIGHTS_FILE)
    except (OSError, ValueError, SafetensorError) as error:
        raise AdapterInvalid(f"The adapter to start from can't be read: {error}", param="start_from") from error
    if _scale(config["r"], config["lora_alpha"], config.get("use_rslora", False)) != _scale(
        spec.rank, spec.alpha, spec.rslora
    ):
        raise AdapterInvalid(
            f"The adapter to start from has rank {config['r']}, alpha {config['lora_alpha']} and rslora "
            f"{config.get('use_rslora', False)}, the job has rank {spec.rank}, alpha {spec.alpha:g} and rslora "
            f"{spec.rslora}: give the job the same, or start afresh.",
            param="start_from",
        )
    for name in sorted(wanted.keys() | weights.keys()):
        have, want = weights.get(name), wanted.get(name)
        if have is None or want is None or have.shape != want.shape:
            raise AdapterInvalid(
                f"The adapter to start from doesn't have the job's targets and rank: {name} is {_shape(have)} there, "
                f"and {_shape(want)} in the job. Give the job the same rank and targets, or start afresh.",
                param="start_from",
            )
    return weights


def adapter_files(spec: JobSpec, weights: Mapping[str, torch.Tensor], base: str) -> dict[str, bytes]:
    """The files that `PeftModel.save_pretrained` would write; the same bytes for the same weights, always."""
    config = lora_config(spec, base).to_dict() | {"inference_mode": True, "target_modules": sorted(spec.targets)}
    return {
        CONFIG_FILE: json.dumps(config, indent=2, sort_keys=True).encode(),
        WEIGHTS_FILE: save(dict(sorted(weights.items())), metadata={"format": "pt"}),
    }


def _scale(rank: int, alpha: float, rslora: bool) -> tuple[int, float]:
    return rank, alpha / (math.sqrt(rank) if rslora else rank)


def _shape(tensor: torch.Tensor | None) -> str:
    return "absent" if tensor is None else f"of shape {tuple(tensor.shape)}"
