"""Adapters as PEFT's folders: what every method is stored as, and may begin from."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from loramill.errors import AdapterInvalid
from loramill.types import ALL_LINEAR, JobSpec

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
#: What PEFT puts before a module's name.
PREFIX = "base_model.model."
A, B, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"


def tensor_name(module: str, part: str) -> str:
    """The name of a module's tensor in the file."""
    return f"{PREFIX}{module}.{part}"


def modules_of(names: Mapping[str, Any]) -> list[str]:
    """The modules that tensors of these names adapt, sorted."""
    return sorted(name.removeprefix(PREFIX).removesuffix(f".{A}") for name in names if name.endswith(f".{A}"))


def lora_config(spec: JobSpec, base: str | None = None, modules: list[str] | None = None) -> LoraConfig:
    """PEFT's configuration of what `spec` asks for.

    Args:
        base: the base's name on the wire.
        modules: those that are adapted; needed where the targets are "all-linear".
    """
    if ALL_LINEAR in spec.targets and modules is None:
        targets: Any = ALL_LINEAR
    elif ALL_LINEAR in spec.targets:
        targets = sorted({module.rpartition(".")[2] for module in modules or ()})
    else:
        targets = sorted(spec.targets)
    return LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        r=spec.rank,
        lora_alpha=_number(spec.alpha),
        use_rslora=spec.rslora,
        use_dora=spec.method == "dora",
        lora_dropout=spec.dropout,
        target_modules=targets,
        layers_to_transform=None if spec.layers is None else list(spec.layers),
        rank_pattern=dict(spec.rank_pattern),
        alpha_pattern={pattern: _number(alpha) for pattern, alpha in spec.alpha_pattern.items()},
    )


def written(spec: JobSpec, tensors: Mapping[str, torch.Tensor], base: str, **changes: object) -> dict[str, bytes]:
    """The files that `PeftModel.save_pretrained` would write, the same bytes for the same tensors, always.

    Args:
        changes: of PEFT's configuration, against what `spec` says.
    """
    config = lora_config(spec, base, modules_of(tensors)).to_dict()
    config |= {"inference_mode": True, "target_modules": sorted(config["target_modules"])} | changes
    held = {name: tensor.detach().contiguous().cpu() for name, tensor in sorted(tensors.items())}
    return {
        CONFIG_FILE: json.dumps(config, indent=2, sort_keys=True).encode(),
        WEIGHTS_FILE: save(held, metadata={"format": "pt"}),
    }


@dataclass(frozen=True, slots=True)
class Stored:
    """An adapter of a folder.

    Attributes:
        tensors: by their names in the file.
        config: PEFT's.
    """

    tensors: dict[str, torch.Tensor]
    config: dict[str, Any]

    def scale(self, module: str) -> float:
        """What the product of the module's B and A is multiplied by."""
        rank = self._of("rank_pattern", module, self.config["r"])
        alpha = self._of("alpha_pattern", module, self.config["lora_alpha"])
        return float(alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank))

    def _of(self, patterns: str, module: str, default: float) -> float:
        values: dict[str, float] = self.config.get(patterns) or {}
        return values.get(get_pattern_key(list(values), module), default)


def read(folder: Path) -> Stored:
    """The adapter that training begins from.

    Raises:
        AdapterInvalid: the folder holds none of LoRA's kind, or can't be read.
    """
    try:
        config = json.loads((folder / CONFIG_FILE).read_bytes())
        tensors: dict[str, torch.Tensor] = load_file(folder / WEIGHTS_FILE)
    except (OSError, ValueError, SafetensorError) as error:
        raise AdapterInvalid(f"The adapter to start from can't be read: {error}", param="start_from") from error
    if not isinstance(config, dict) or not {"r", "lora_alpha"} <= config.keys():
        raise AdapterInvalid(
            f"The adapter to start from is no LoRA: {CONFIG_FILE} lacks 'r' or 'lora_alpha'. Start afresh.",
            param="start_from",
        )
    return Stored(tensors, config)


def check_same(stored: Stored, wanted: Mapping[str, torch.Size], scales: Mapping[str, float]) -> None:
    """Checks that the stored adapter is just what the job would make.

    Args:
        wanted: the shapes of the job's tensors, by their names in the file.
        scales: the job's, by module.

    Raises:
        AdapterInvalid: its method, targets, ranks or scales are others.
    """
    for name in sorted(wanted.keys() | stored.tensors.keys()):
        have, want = stored.tensors.get(name), wanted.get(name)
        if have is None or want is None or have.shape != want:
            raise AdapterInvalid(
                "The adapter to start from doesn't have the job's method, targets and rank: "
                f"{name} is {_shape(None if have is None else have.shape)} there, and {_shape(want)} in the job. Give "
                "the job the same method, rank and targets, or start afresh.",
                param="start_from",
            )
    check_scales(stored, scales)


def check_scales(stored: Stored, scales: Mapping[str, float]) -> None:
    """Checks that the stored adapter's scales are the job's.

    Raises:
        AdapterInvalid: they are others.
    """
    for module, scale in scales.items():
        if not math.isclose(stored.scale(module), scale, rel_tol=1e-6):
            raise AdapterInvalid(
                f"The adapter to start from scales {module} by {stored.scale(module):g}, the job by {scale:g}: give "
                "the job the same alpha, rank and rslora, or start afresh.",
                param="start_from",
            )


def _number(value: float) -> float:
    return int(value) if float(value).is_integer() else value


def _shape(shape: torch.Size | None) -> str:
    return "absent" if shape is None else f"of shape {tuple(shape)}"
