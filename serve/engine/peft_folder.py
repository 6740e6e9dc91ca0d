"""An adapter in PEFT's format, brought to the normal form."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from loramill.errors import AdapterInvalid
from loramill.kernels import Delta

_WEIGHT = re.compile(
    r"base_model\.model\.(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_magnitude_vector)"
)

#: Settings of PEFT's LoraConfig that change what an adapter computes and have no place in the normal form.
_UNSUPPORTED = (
    "modules_to_save",
    "target_parameters",
    "trainable_token_indices",
    "layer_replication",
    "fan_in_fan_out",
    "lora_bias",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "velora_config",
    "monteclora_config",
)

#: Initialisations that change the base's own weights: such an adapter is right only on that changed base.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def read_adapter(folder: Path, target_weight: Callable[[str], torch.Tensor | None]) -> dict[str, Delta]:
    """Reads `adapter_config.json` and `adapter_model.safetensors`.

    Args:
        folder: as PEFT's `save_pretrained` writes it.
        target_weight: the base's weight [d_out, d_in] of a module, or None if adapters can't target it.

    Returns:
        The adapter's deltas by module.

    Raises:
        AdapterInvalid: broken files, another method, or something that the engine can't serve; it is named.
    """
    config = _read_config(folder)
    parts = _read_weights(folder)
    if not parts:
        raise AdapterInvalid(f"The adapter in {folder.name} has no weights.")
    deltas: dict[str, Delta] = {}
    for module, tensors in parts.items():
        weight = target_weight(module)
        if weight is None:
            raise AdapterInvalid(f"The adapter in {folder.name} targets '{module}', which this base can't adapt.")
        deltas[module] = _delta(folder.name, module, tensors, config, weight)
    return deltas


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterInvalid(f"adapter_config.json in {folder.name} can't be read: {error}.") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise AdapterInvalid(f"The adapter in {folder.name} is no LoRA adapter of PEFT (peft_type LORA).")
    for key in _UNSUPPORTED:
        if config.get(key):
            raise AdapterInvalid(f"The adapter in {folder.name} uses '{key}', which the engine can't serve.")
    if config.get("bias", "none") != "none":
        raise AdapterInvalid(f"The adapter in {folder.name} trains biases; train with bias='none'.")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise AdapterInvalid(
            f"The adapter in {folder.name} was initialised by '{start}', which changes the base's weights; "
            "convert it to a plain LoRA when saving (path_initial_model_for_weight_conversion)."
        )
    return config


def _read_weights(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    parts: dict[str, dict[str, torch.Tensor]] = {}
    try:
        with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (safe_open is no dict)
                match = _WEIGHT.fullmatch(name)
                if match is None:
                    raise AdapterInvalid(f"The adapter in {folder.name} holds '{name}', which the engine can't serve.")
                tensor = file.get_tensor(name)
                if not tensor.is_floating_point():
                    raise AdapterInvalid(f"'{name}' of the adapter in {folder.name} is {tensor.dtype}, not a float.")
                parts.setdefault(match["module"], {})[match["part"]] = tensor.float()
    except (OSError, SafetensorError) as error:
        raise AdapterInvalid(f"adapter_model.safetensors in {folder.name} can't be read: {error}.") from error
    return parts


def _delta(
    name: str, module: str, tensors: dict[str, torch.Tensor], config: dict[str, Any], weight: torch.Tensor
) -> Delta:
    dora = bool(config.get("use_dora"))
    wanted = {"lora_A.weight", "lora_B.weight"} | ({"lora_magnitude_vector"} if dora else set())
    if set(tensors) != wanted:
        raise AdapterInvalid(f"'{module}' of the adapter in {name} has {sorted(tensors)}; it needs {sorted(wanted)}.")
    a, b = tensors["lora_A.weight"], tensors["lora_B.weight"]
    rank, scale = _rank_and_scale(name, module, config)
    d_out, d_in = weight.shape
    _check_shape(name, module, "lora_A", a, (rank, d_in))
    _check_shape(name, module, "lora_B", b, (d_out, rank))
    b = b * scale
    if not dora:
        return Delta(a, b)
    magnitude = tensors["lora_magnitude_vector"]
    _check_shape(name, module, "lora_magnitude_vector", magnitude, (d_out,))
    # DoRA (Liu et al. 2024, eq. 5): each row of the merged weight gets the learned length.
    return Delta(a, b, magnitude / torch.linalg.vector_norm(weight.float() + b @ a, dim=1))


def _rank_and_scale(name: str, module: str, config: dict[str, Any]) -> tuple[int, float]:
    try:
        rank = int(_by_pattern(config.get("rank_pattern") or {}, module, config["r"]))
        alpha = float(_by_pattern(config.get("alpha_pattern") or {}, module, config["lora_alpha"]))
    except (KeyError, TypeError, ValueError, AttributeError, re.error) as error:
        raise AdapterInvalid(f"adapter_config.json in {name} lacks or garbles rank or alpha: {error!r}.") from error
    if rank < 1:
        raise AdapterInvalid(f"'{module}' of the adapter in {name} has rank {rank}; it must be at least 1.")
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _by_pattern(patterns: dict[str, Any], module: str, default: Any) -> Any:
    # PEFT's rule: the first key that, as a regular expression, matches the name's end at a dot.
    matching: Iterable[Any] = (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module))
    return next(iter(matching), default)


def _check_shape(name: str, module: str, part: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise AdapterInvalid(
            f"{part} of '{module}' of the adapter in {name} is {list(tensor.shape)}; "
            f"this base and the adapter's config need {list(shape)}."
        )
