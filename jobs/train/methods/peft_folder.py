"""Adapters as PEFT folders, the format in which every method is stored, and from which training can start."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save

from loramill.errors import AdapterInvalid
from loramill.kernels.peft_folder import CONFIG_FILE, PREFIX, WEIGHTS_FILE, BaseModules, read_modules
from loramill.types import ALL_LINEAR, JobSpec

A, B = "lora_A.weight", "lora_B.weight"


def tensor_name(module: str, part: str) -> str:
    """Returns the name of a module's tensor in the file."""
    return f"{PREFIX}{module}.{part}"


def modules_of(names: Mapping[str, Any]) -> list[str]:
    """Returns the modules that tensors of these names adapt, sorted."""
    return sorted(name.removeprefix(PREFIX).removesuffix(f".{A}") for name in names if name.endswith(f".{A}"))


def lora_config(spec: JobSpec, base: str | None = None, modules: list[str] | None = None) -> LoraConfig:
    """Returns PEFT's configuration for `spec`.

    Args:
        base: the base's name in the API.
        modules: the adapted modules; needed if the targets are "all-linear".
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


def peft_files(
    spec: JobSpec, tensors: Mapping[str, torch.Tensor], base: str, **config_overrides: object
) -> dict[str, bytes]:
    """Returns the files that `PeftModel.save_pretrained` would write, by name; the same bytes for the same tensors.

    Args:
        config_overrides: values of PEFT's configuration that differ from the spec's.
    """
    config = lora_config(spec, base, modules_of(tensors)).to_dict()
    config |= {"inference_mode": True, "target_modules": sorted(config["target_modules"])} | config_overrides
    held = {name: tensor.detach().contiguous().cpu() for name, tensor in sorted(tensors.items())}
    return {
        CONFIG_FILE: json.dumps(config, indent=2, sort_keys=True).encode(),
        WEIGHTS_FILE: save(held, metadata={"format": "pt"}),
    }


@dataclass(frozen=True, slots=True)
class StoredAdapter:
    """An adapter in a folder.

    Attributes:
        tensors: by their names in PEFT's file.
        scales: factor of the product of a module's B and A, by module.
    """

    tensors: dict[str, torch.Tensor]
    scales: dict[str, float]


def read_start_adapter(folder: Path, base: BaseModules) -> StoredAdapter:
    """Reads the adapter that training starts from.

    Raises:
        AdapterInvalid: the folder contains no LoRA, or it is damaged, incomplete or of another base.
    """
    try:
        found = read_modules(folder, base)
    except AdapterInvalid as error:
        raise AdapterInvalid(f"The adapter to start from can't be read: {error}", param="start_from") from error
    tensors: dict[str, torch.Tensor] = {}
    for module, adapted in found.items():
        tensors |= adapted.tensors(module)
    return StoredAdapter(tensors, {module: adapted.scale for module, adapted in found.items()})


def check_same(stored: StoredAdapter, expected: Mapping[str, torch.Size], scales: Mapping[str, float]) -> None:
    """Checks that the stored adapter has the tensors and scales of the job's adapter.

    Args:
        expected: shapes of the job's tensors, by their names in the file.
        scales: the job's scales, by module.

    Raises:
        AdapterInvalid: its method, targets, ranks or scales differ.
    """
    for name in sorted(expected.keys() | stored.tensors.keys()):
        tensor, shape = stored.tensors.get(name), expected.get(name)
        if tensor is None or shape is None or tensor.shape != shape:
            raise AdapterInvalid(
                "The adapter to start from does not have the job's method, targets and rank: "
                f"{name} is {_shape(None if tensor is None else tensor.shape)} there, and {_shape(shape)} in the job. "
                "Give the job the same method, rank and targets, or leave out 'start_from'.",
                param="start_from",
            )
    check_scales(stored, scales)


def check_scales(stored: StoredAdapter, scales: Mapping[str, float]) -> None:
    """Checks that the stored adapter has the job's scales.

    Raises:
        AdapterInvalid: its scales differ.
    """
    for module, scale in scales.items():
        if not math.isclose(stored.scales[module], scale, rel_tol=1e-6):
            raise AdapterInvalid(
                f"The adapter to start from scales {module} by {stored.scales[module]:g}, the job by {scale:g}: give "
                "the job the same alpha, rank and rslora, or leave out 'start_from'.",
                param="start_from",
            )


def _number(value: float) -> float:
    return int(value) if float(value).is_integer() else value


def _shape(shape: torch.Size | None) -> str:
    return "absent" if shape is None else f"of shape {tuple(shape)}"
