"""Writes an adapter in the normalized form in which imported adapters are stored."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping

import torch
from safetensors.torch import save

from loramill.kernels.peft_folder.base import BaseModules
from loramill.kernels.peft_folder.config import CONFIG_FILE
from loramill.kernels.peft_folder.reader import WEIGHTS_FILE, AdapterModule


def normalized_files(modules: Mapping[str, AdapterModule], base: BaseModules, base_name: str) -> dict[str, bytes]:
    """The files that PEFT would write for a LoRA or DoRA, with the base's own names; equal adapters give equal bytes.

    Args:
        modules: By name, at least one; either all have a magnitude or none has.
        base: The base's modules.
        base_name: The base's name in the API.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, adapted in modules.items():
        tensors |= adapted.tensors(name)
    contiguous = {name: tensor.contiguous() for name, tensor in sorted(tensors.items())}
    config = json.dumps(_config(modules, base, base_name), indent=2, sort_keys=True)
    return {CONFIG_FILE: config.encode(), WEIGHTS_FILE: save(contiguous, metadata={"format": "pt"})}


def _config(modules: Mapping[str, AdapterModule], base: BaseModules, base_name: str) -> dict[str, object]:
    ranks = {name: len(adapted.a) for name, adapted in modules.items()}
    alphas = {name: _number(adapted.scale * len(adapted.a)) for name, adapted in modules.items()}
    (rank, _), (alpha, _) = Counter(ranks.values()).most_common(1)[0], Counter(alphas.values()).most_common(1)[0]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "bias": "none",
        "r": rank,
        "lora_alpha": alpha,
        "use_dora": any(adapted.magnitude is not None for adapted in modules.values()),
        "target_modules": _targets(modules, base),
        "rank_pattern": {name: each for name, each in ranks.items() if each != rank},
        "alpha_pattern": {name: each for name, each in alphas.items() if each != alpha},
    }


def _targets(modules: Mapping[str, AdapterModule], base: BaseModules) -> list[str]:
    """The last parts of the names if these match exactly these modules, else the full names."""
    last = {name.rpartition(".")[2] for name in modules}
    meant = {name for name in base.modules if name.rpartition(".")[2] in last}
    return sorted(last if meant == modules.keys() else modules)


def _number(value: float) -> float:
    """Rounds off the last bits, in which alpha / rank * rank may differ."""
    rounded = round(value, 9)
    return int(rounded) if rounded.is_integer() else rounded
