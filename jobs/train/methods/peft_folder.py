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
from safetensors.torch import save

from loramill.errors import AdapterInvalid
from loramill.kernels.peft_folder import CONFIG_FILE, PREFIX, WEIGHTS_FILE, BaseModules, read_modules
from loramill.kernels.peft_folder.names import EMBEDDING_A, EMBEDDING_B
from loramill.types import ALL_LINEAR, JobSpec

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


def peft_files(
    spec: JobSpec, tensors: Mapping[str, torch.Tensor], base: str, **config_overrides: object
) -> dict[str, bytes]:
    """The files that `PeftModel.save_pretrained` would write, the same bytes for the same tensors, always.

    Args:
        changes: of PEFT's configuration, against what `spec` says.
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
    """An adapter of a folder.

    Attributes:
        tensors: by the names that PEFT gives them in a file.
        scales: what the product of a module's B and A is multiplied by, by module.
    """

    tensors: dict[str, torch.Tensor]
    scales: dict[str, float]


def read_start_adapter(folder: Path, base: BaseModules) -> StoredAdapter:
    """The adapter that training begins from.

    Raises:
        AdapterInvalid: the folder holds no LoRA, or it is broken, incomplete or of another base.
    """
    try:
        found = read_modules(folder, base)
    except AdapterInvalid as error:
        raise AdapterInvalid(f"The adapter to start from can't be read: {error}", param="start_from") from error
    tensors: dict[str, torch.Tensor] = {}
    for module, tuned in found.items():
        a, b = (EMBEDDING_A, EMBEDDING_B) if tuned.lookup else (A, B)
        tensors |= {tensor_name(module, a): tuned.a, tensor_name(module, b): tuned.b}
        if tuned.magnitude is not None:
            tensors[tensor_name(module, MAGNITUDE)] = tuned.magnitude
    return StoredAdapter(tensors, {module: tuned.scale for module, tuned in found.items()})


def check_same(stored: StoredAdapter, expected: Mapping[str, torch.Size], scales: Mapping[str, float]) -> None:
    """Checks that the stored adapter is just what the job would make.

    Args:
        wanted: the shapes of the job's tensors, by their names in the file.
        scales: the job's, by module.

    Raises:
        AdapterInvalid: its method, targets, ranks or scales are others.
    """
    for name in sorted(expected.keys() | stored.tensors.keys()):
        have, want = stored.tensors.get(name), expected.get(name)
        if have is None or want is None or have.shape != want:
            raise AdapterInvalid(
                "The adapter to start from doesn't have the job's method, targets and rank: "
                f"{name} is {_shape(None if have is None else have.shape)} there, and {_shape(want)} in the job. Give "
                "the job the same method, rank and targets, or start afresh.",
                param="start_from",
            )
    check_scales(stored, scales)


def check_scales(stored: StoredAdapter, scales: Mapping[str, float]) -> None:
    """Checks that the stored adapter's scales are the job's.

    Raises:
        AdapterInvalid: they are others.
    """
    for module, scale in scales.items():
        if not math.isclose(stored.scales[module], scale, rel_tol=1e-6):
            raise AdapterInvalid(
                f"The adapter to start from scales {module} by {stored.scales[module]:g}, the job by {scale:g}: give "
                "the job the same alpha, rank and rslora, or start afresh.",
                param="start_from",
            )


def _number(value: float) -> float:
    return int(value) if float(value).is_integer() else value


def _shape(shape: torch.Size | None) -> str:
    return "absent" if shape is None else f"of shape {tuple(shape)}"
