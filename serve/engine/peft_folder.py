"""An adapter in PEFT's format, brought to the normal form."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from loramill.errors import AdapterInvalid
from loramill.kernels import Delta
from loramill.kernels.memory import Memory, host_memory
from loramill.serve.engine.safetensors_file import read_tensors

#: `Model.target_weight`.
TargetWeight = Callable[[str], torch.Tensor | None]

_PREFIX = "base_model.model."
_A, _B, _E, _RANKS = "lora_A", "lora_B", "lora_E", "ranknum"
_EMBEDDING_A, _EMBEDDING_B = "lora_embedding_A", "lora_embedding_B"
_MAGNITUDE = "lora_magnitude_vector"
#: Of the base's own layers, and how `TargetWeight` calls them.
_BASE = {"base_layer.weight": "", "weight": "", "base_layer.bias": ".bias", "bias": ".bias"}
#: Ends of the tensors' names, and what each is; AdaLoRA's A and B are no modules and so have no `.weight`.
_PARTS = {
    **{f"{part}.weight": part for part in (_A, _B)},
    **{part: part for part in (_A, _B, _E, _RANKS, _EMBEDDING_A, _EMBEDDING_B, _MAGNITUDE, *_BASE)},
}
_NAME = re.compile(rf"{re.escape(_PREFIX)}(.+?)\.({'|'.join(map(re.escape, _PARTS))})")

#: Settings of PEFT's LoraConfig that change what an adapter computes and have no place in the normal form.
_UNSUPPORTED = (
    "modules_to_save",
    "target_parameters",
    "trainable_token_indices",
    "layer_replication",
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


def read_adapter(folder: Path, target_weight: TargetWeight, memory: Memory = host_memory) -> dict[str, Delta]:
    """Reads `adapter_config.json` and `adapter_model.safetensors`, of LoRA or raw AdaLoRA.

    Whether the modules are there and of these shapes in the base, `kernels.adapter.pack` checks.

    Args:
        folder: as PEFT's `save_pretrained` writes it.
        target_weight: called for modules of DoRA, and for those whose base layer lies beside the adapter.
        memory: where the file's bytes go.

    Returns:
        The adapter's deltas by module, over these bytes.

    Raises:
        AdapterInvalid: broken files, another method, or something that the engine can't serve; it is named.
    """
    name = folder.name
    config = _read_config(folder)
    modules = _read_weights(folder, memory)
    if not modules:
        raise AdapterInvalid(f"The adapter in {name} has no weights.")
    _check_base_layers(name, modules, target_weight)
    if config["peft_type"] == "ADALORA":
        found = {module: _adalora(name, module, parts, config) for module, parts in modules.items()}
        return {module: delta for module, delta in found.items() if delta is not None}
    ranks, alphas = (_Patterns(name, config, key) for key in ("rank_pattern", "alpha_pattern"))
    deltas: dict[str, Delta] = {}
    for module, parts in modules.items():
        rank, scale = _rank_and_scale(name, module, config, ranks, alphas)
        deltas[module] = _lora(name, module, parts, rank, scale, bool(config.get("use_dora")), target_weight)
    return deltas


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterInvalid(f"adapter_config.json in {folder.name} can't be read: {error}.") from error
    if not isinstance(config, dict) or config.get("peft_type") not in ("LORA", "ADALORA"):
        raise AdapterInvalid(f"adapter_config.json in {folder.name} is of no LoRA adapter; the engine serves LoRA.")
    used = [key for key in _UNSUPPORTED if config.get(key)]
    if used:
        raise AdapterInvalid(f"The adapter in {folder.name} uses {', '.join(used)}, which the engine can't serve.")
    if config.get("bias", "none") != "none":
        raise AdapterInvalid(f"The adapter in {folder.name} trains biases; the engine serves bias='none' only.")
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.startswith(_CHANGES_BASE):
        raise AdapterInvalid(
            f"The adapter in {folder.name} was started with {start}, which changes the base; convert it to the "
            "unmodified base when saving (path_initial_model_for_weight_conversion)."
        )
    return config


def _read_weights(folder: Path, memory: Memory) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors by module and part, in the file's dtypes."""
    modules: dict[str, dict[str, torch.Tensor]] = {}
    try:
        tensors = read_tensors(folder / "adapter_model.safetensors", memory)
    except (OSError, ValueError) as error:
        raise AdapterInvalid(f"adapter_model.safetensors in {folder.name} can't be read: {error}.") from error
    for name, tensor in tensors.items():
        match = _NAME.fullmatch(name)
        if match is None:
            raise AdapterInvalid(f"The adapter in {folder.name} holds '{name}', which the engine can't serve.")
        modules.setdefault(match[1], {})[_PARTS[match[2]]] = tensor
    return modules


def _check_base_layers(name: str, modules: dict[str, dict[str, torch.Tensor]], target_weight: TargetWeight) -> None:
    """Takes out the base's own layers, which PEFT saves beside adapters of embeddings and heads."""
    for module, parts in list(modules.items()):
        for part in parts.keys() & _BASE.keys():
            saved, own = parts.pop(part), target_weight(module + _BASE[part])
            if own is None or not _equal(saved, own):
                raise AdapterInvalid(
                    f"The adapter in {name} comes with its own base layer '{module}', which is not this base's: train "
                    "on the unmodified base, or save with save_embedding_layers=False if it was trained on just that."
                )
        if not parts:
            del modules[module]


def _equal(saved: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether both are the same numbers, once rounded to the coarser of the dtypes."""
    return torch.equal(saved.to(weight.dtype), weight) or torch.equal(saved, weight.to(saved.dtype))


def _lora(
    name: str,
    module: str,
    parts: dict[str, torch.Tensor],
    rank: int,
    scale: float,
    dora: bool,
    target_weight: TargetWeight,
) -> Delta:
    lookup = _EMBEDDING_A in parts
    of_a, of_b = (_EMBEDDING_A, _EMBEDDING_B) if lookup else (_A, _B)
    _check_parts(name, module, parts, {of_a, of_b} | ({_MAGNITUDE} if dora else set()))
    if dora and lookup:
        raise AdapterInvalid(f"The adapter in {name} uses DoRA on the embedding '{module}', which isn't served.")
    a, b = parts[of_a], parts[of_b]
    _check_rank(name, module, rank, a, b)
    if not dora:
        return Delta(a, b, lookup=lookup, scale=scale)
    weight, magnitude = target_weight(module), parts[_MAGNITUDE].float()
    if weight is None:
        raise AdapterInvalid(f"The adapter in {name} targets '{module}', which this base can't adapt.")
    if (len(b), a.shape[1]) != weight.shape or magnitude.shape != weight.shape[:1]:
        raise AdapterInvalid(
            f"lora_A, lora_B and {_MAGNITUDE} of '{module}' of the adapter in {name} are {list(a.shape)}, "
            f"{list(b.shape)} and {list(magnitude.shape)}, which don't fit this base's {list(weight.shape)}."
        )
    # DoRA (Liu et al. 2024, eq. 5): each row of the merged weight gets the learned length.
    length = torch.linalg.vector_norm(weight.float() + scale * (b.float() @ a.float()), dim=1)
    return Delta(a, b, magnitude / length, scale=scale)


def _adalora(name: str, module: str, parts: dict[str, torch.Tensor], config: dict[str, Any]) -> Delta | None:
    """B diag(E) A (Zhang et al. 2023, eq. 3) without the ranks whose singular value is 0; None if all are."""
    ranknum = parts.pop(_RANKS, None)
    _check_parts(name, module, parts, {_A, _B, _E})
    a, b, e = parts[_A], parts[_B], parts[_E].float().flatten()
    try:
        rank = int(config["init_r"])
        # PEFT divides by the rank before any was pruned, and doesn't save it since 0.18.
        divisor = (float(rank) if ranknum is None else ranknum.float().item()) + 1e-5
        kept = (config.get("rank_pattern") or {}).get(f"{module}.{_E}")
        rank = rank if kept is None else sum(map(bool, kept))
        alpha = float(config["lora_alpha"])
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise AdapterInvalid(f"adapter_config.json in {name} lacks or garbles rank or alpha: {error!r}.") from error
    _check_rank(name, module, rank, a, b)
    if len(e) != rank:
        raise AdapterInvalid(f"lora_E of '{module}' of the adapter in {name} has {len(e)} ranks, lora_A {rank}.")
    alive = e != 0
    scale = (alpha if alpha > 0 else float(rank)) / divisor
    return Delta(a[alive], b.float()[:, alive] * (e[alive] * scale)) if alive.any() else None


def _rank_and_scale(
    name: str, module: str, config: dict[str, Any], ranks: _Patterns, alphas: _Patterns
) -> tuple[int, float]:
    try:
        rank, alpha = int(ranks.of(module, config["r"])), float(alphas.of(module, config["lora_alpha"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise AdapterInvalid(f"adapter_config.json in {name} lacks or garbles rank or alpha: {error!r}.") from error
    if rank < 1:
        raise AdapterInvalid(f"'{module}' of the adapter in {name} has rank {rank}; it must be at least 1.")
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


class _Patterns:
    """PEFT's rule: the first key that, as a regular expression, matches the module's end at a dot.

    Plain names are looked up: an adapter may have one for each module.
    """

    def __init__(self, name: str, config: dict[str, Any], key: str) -> None:
        self._plain: dict[str, tuple[int, Any]] = {}
        self._others: list[tuple[int, re.Pattern[str], Any]] = []
        try:
            for index, (pattern, value) in enumerate((config.get(key) or {}).items()):
                if re.fullmatch(r"[\w.]+", pattern):
                    self._plain[pattern] = (index, value)
                else:
                    self._others.append((index, re.compile(rf"(.*\.)?({pattern})$"), value))
        except (AttributeError, re.error) as error:
            raise AdapterInvalid(f"adapter_config.json in {name} lacks or garbles rank or alpha: {error!r}.") from error

    def of(self, module: str, default: Any) -> Any:
        """The module's value."""
        if not self._plain and not self._others:
            return default
        parts = module.split(".")
        ends = (".".join(parts[start:]) for start in range(len(parts)))
        matching = [self._plain[end] for end in ends if end in self._plain]
        matching += [(index, value) for index, pattern, value in self._others if pattern.match(module)]
        return min(matching, key=lambda match: match[0])[1] if matching else default


def _check_parts(name: str, module: str, parts: dict[str, torch.Tensor], wanted: set[str]) -> None:
    if set(parts) != wanted:
        raise AdapterInvalid(f"'{module}' of the adapter in {name} has {sorted(parts)}; it needs {sorted(wanted)}.")


def _check_rank(name: str, module: str, rank: int, a: torch.Tensor, b: torch.Tensor) -> None:
    if a.ndim != 2 or b.ndim != 2 or len(a) != rank or b.shape[1] != rank:
        raise AdapterInvalid(
            f"lora_A of '{module}' of the adapter in {name} is {list(a.shape)} and lora_B {list(b.shape)}; by the "
            f"adapter's config their rank is {rank}."
        )
