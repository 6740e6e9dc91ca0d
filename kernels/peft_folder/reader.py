"""Reads an adapter in PEFT's format, checks it against its config and base, and converts it to the normal form."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loramill.errors import AdapterInvalid
from loramill.kernels.adapters.packing import Delta
from loramill.kernels.memory import Allocator, host_memory
from loramill.kernels.peft_folder.base import BaseModules, Module
from loramill.kernels.peft_folder.config import CONFIG_FILE, Patterns, TargetModules, parse_config, read_config
from loramill.kernels.peft_folder.names import (
    BIAS,
    EMBEDDING_A,
    EMBEDDING_B,
    MAGNITUDE,
    RANKS,
    WEIGHT,
    A,
    B,
    E,
    FileModule,
    by_module,
    file_name,
)
from loramill.kernels.peft_folder.safetensors_file import first_non_finite, read_tensors

__all__ = ["GAINS_FILE", "WEIGHTS_FILE", "AdapterModule", "parse_config", "read_adapter", "read_modules"]

WEIGHTS_FILE = "adapter_model.safetensors"
#: DoRA's gains of a version that a job has published, float32 [d_out] by module. Other programs do not read this file.
GAINS_FILE = "dora_gains.safetensors"
#: Files of other programs, and what to do with them.
_OTHER_FILES = {
    "adapter_model.bin": "it has adapter_model.bin, a pickle, which can run any code and is not read. If you trust it, "
    "convert it: safetensors.torch.save_file(torch.load('adapter_model.bin', weights_only=True), "
    f"'{WEIGHTS_FILE}')",
    "adapters.safetensors": "it has adapters.safetensors, MLX-LM's format: convert that to PEFT's",
    "adapter_model.safetensors.index.json": "its weights are in shards: save them in one file",
}


@dataclass(frozen=True, slots=True)
class AdapterModule:
    """The adapter of one module, as trained, in the file's dtype.

    Attributes:
        a: [r, d_in].
        b: [d_out, r].
        scale: Factor of b @ a.
        magnitude: DoRA's magnitude [d_out]; None without DoRA.
        lookup: Whether the module is an embedding.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    magnitude: torch.Tensor | None = None
    lookup: bool = False

    def tensors(self, module: str) -> dict[str, torch.Tensor]:
        """The tensors of a module of this name, by their names in the file."""
        a, b = (EMBEDDING_A, EMBEDDING_B) if self.lookup else (A, B)
        tensors = {file_name(module, a): self.a, file_name(module, b): self.b}
        if self.magnitude is not None:
            tensors[file_name(module, MAGNITUDE)] = self.magnitude
        return tensors

    def delta(self, gain: torch.Tensor | None) -> Delta:
        """The normal form.

        Args:
            gain: DoRA's gain, float32 [d_out]; None without a magnitude.
        """
        return Delta(self.a, self.b, gain, self.lookup, self.scale)


def read_adapter(
    folder: Path, base: BaseModules, allocate: Allocator = host_memory, *, published_gains: bool = True
) -> dict[str, Delta]:
    """The deltas of an adapter by module.

    DoRA's gains are in the folder if a job has published it; otherwise they are computed, for which the base's weights
    are read.

    Args:
        folder, base, allocate: See `read_modules`.
        published_gains: Whether gains in the folder are used: they are those of the base that the job trained on, in
            its quantization.

    Raises:
        AdapterInvalid: See `read_modules`; or the gains do not belong to the adapter.
    """
    modules = read_modules(folder, base, allocate)
    gains: dict[str, torch.Tensor] = {}
    if published_gains and (folder / GAINS_FILE).is_file():
        gains = _read_gains(folder, modules, base, allocate)
    return {
        module: adapted.delta(gains[module] if module in gains else _computed_gain(module, adapted, base))
        for module, adapted in modules.items()
    }


def _computed_gain(module: str, adapted: AdapterModule, base: BaseModules) -> torch.Tensor | None:
    """DoRA (Liu et al. 2024, equation 5): each row of the merged weight gets the learned length."""
    if adapted.magnitude is None:
        return None
    return adapted.magnitude.float() / base.norms_of(module, adapted.a, adapted.b, adapted.scale)


def _read_gains(
    folder: Path, modules: Mapping[str, AdapterModule], base: BaseModules, memory: Allocator
) -> dict[str, torch.Tensor]:
    """The gains that a job has published, of exactly the modules with a magnitude."""
    shapes = {module: one.magnitude.shape for module, one in modules.items() if one.magnitude is not None}
    tensors = _read_tensors(folder, GAINS_FILE, memory)
    gains = {(base.find(name) or (name,))[0]: gain for name, gain in tensors.items()}
    wrong = sorted(
        name for name in gains.keys() | shapes.keys() if name not in gains or gains[name].shape != shapes.get(name)
    )
    if wrong:
        raise AdapterInvalid(
            f"{GAINS_FILE} in {folder.name} is not the adapter's: the gain of '{wrong[0]}' is missing, or has another "
            "shape than its magnitude. Remove the file; the gains are then computed."
        )
    return gains


def read_modules(folder: Path, base: BaseModules, allocate: Allocator = host_memory) -> dict[str, AdapterModule]:
    """Reads `adapter_config.json` and `adapter_model.safetensors` of LoRA or raw AdaLoRA.

    Args:
        folder: Written by PEFT's `save_pretrained`, or by another program in its format; names may have other prefixes
            or contain the adapter's name.
        base: Its weights are read to compare them with base weights in the file, if there are any.
        allocate: Returns the memory for the file's bytes.

    Returns:
        The adapter of each module, in the base's order; the tensors share the file's bytes. Modules whose AdaLoRA
        ranks are all pruned are left out.

    Raises:
        AdapterInvalid: The file is broken, the method or a feature is not supported, a required tensor is missing, of
            another shape or not finite, or a tensor is not required. The message names it.
    """
    config = read_config(folder)
    name = folder.name
    found = _read_file(folder, base, allocate)
    trained = base.trained_names({module: own.trained for module, own in found.items()})
    _drop_base_layers(name, found, base)
    if not found:
        raise AdapterInvalid(f"The adapter in {name} has no weights.")
    promised = _targeted(name, config, found, trained, base)
    adalora = config["peft_type"] == "ADALORA"
    ranks, alphas = (Patterns(name, config, key) for key in ("rank_pattern", "alpha_pattern"))
    adapted: dict[str, AdapterModule] = {}
    for module in promised:
        site, called, own = base.modules[module], trained[module], found.get(module)
        if adalora:
            one = _adalora(name, module, site, called, own, config)
        else:
            rank, scale = _rank_and_scale(name, module, config, ranks.of(called, module), alphas.of(called, module))
            one = _lora(name, module, site, own, rank, scale, bool(config.get("use_dora")))
        if one is not None:
            adapted[module] = one
    return adapted


def _read_file(folder: Path, base: BaseModules, memory: Allocator) -> dict[str, FileModule]:
    if not (folder / WEIGHTS_FILE).is_file():
        for other, reason in _OTHER_FILES.items():
            if (folder / other).is_file():
                raise AdapterInvalid(f"{folder.name} has no {WEIGHTS_FILE}; {reason}.")
    return by_module(folder.name, _read_tensors(folder, WEIGHTS_FILE, memory), base)


def _read_tensors(folder: Path, name: str, memory: Allocator) -> dict[str, torch.Tensor]:
    try:
        tensors = read_tensors(folder / name, memory)
    except (OSError, ValueError) as error:
        raise AdapterInvalid(f"{name} in {folder.name} can't be read: {error}.") from error
    broken = first_non_finite(tensors)
    if broken is not None:
        raise AdapterInvalid(f"'{broken}' of the adapter in {folder.name} holds values that are NaN or infinite.")
    return tensors


def _targeted(
    name: str, config: Mapping[str, Any], found: Mapping[str, FileModule], trained: Mapping[str, str], base: BaseModules
) -> list[str]:
    """The modules that the config targets, in the base's order.

    Raises:
        AdapterInvalid: The file contains a module that is not targeted.
    """
    targets = TargetModules(name, config)
    # A config may use the modules' names in training, or those in this base.
    promised = {
        module: None
        for module, site in base.modules.items()
        if (trained[module], site) in targets or (trained[module] != module and (module, site) in targets)
    }
    if config.get("ensure_weight_tying"):
        # PEFT gives the head the embedding's adapter, transposed, and saves both; or the embedding the head's.
        ends = [module for module, site in base.modules.items() if site.head or site.lookup]
        if any(module in promised for module in ends):
            promised |= dict.fromkeys(module for module in ends if module in found)
    for module, own in found.items():
        if module not in promised:
            raise AdapterInvalid(
                f"The adapter in {name} holds '{next(iter(own.names.values()))}', and its {CONFIG_FILE} doesn't target "
                f"'{own.trained}': correct target_modules, or save it again."
            )
    return [module for module in base.modules if module in promised]


def _drop_base_layers(name: str, found: dict[str, FileModule], base: BaseModules) -> None:
    """Removes base weights, which PEFT saves with adapters of embeddings and heads, after comparing them."""
    for module, own in list(found.items()):
        for part, end in ((WEIGHT, ""), (BIAS, ".bias")):
            if part not in own.parts:
                continue
            saved, weight = own.parts.pop(part), base.weight(module + end)
            if weight is None or not _equal(saved, weight):
                raise AdapterInvalid(
                    f"The adapter in {name} comes with its own base layer '{module}', which is not this base's: train "
                    "on the unmodified base, or save with save_embedding_layers=False if it was trained on just that."
                )
        if not own.parts:
            del found[module]


def _equal(saved: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether both are equal after rounding to the coarser of their dtypes."""
    return torch.equal(saved.to(weight.dtype), weight) or torch.equal(saved, weight.to(saved.dtype))


def _lora(
    name: str, module: str, site: Module, own: FileModule | None, rank: int, scale: float, dora: bool
) -> AdapterModule:
    of_a, of_b = (EMBEDDING_A, EMBEDDING_B) if site.lookup else (A, B)
    if dora and site.lookup:
        raise AdapterInvalid(f"The adapter in {name} uses DoRA on the embedding '{module}', which isn't supported.")
    required = {of_a: (rank, site.d_in), of_b: (site.d_out, rank)} | ({MAGNITUDE: (site.d_out,)} if dora else {})
    parts = _require_parts(name, module, own, required)
    return AdapterModule(parts[of_a], parts[of_b], scale, parts.get(MAGNITUDE), site.lookup)


def _adalora(
    name: str, module: str, site: Module, trained: str, own: FileModule | None, config: Mapping[str, Any]
) -> AdapterModule | None:
    """B diag(E) A (Zhang et al. 2023, eq. 3) without the ranks whose singular value is 0; None if all are 0."""
    try:
        rank, alpha = int(config["init_r"]), float(config["lora_alpha"])
        divisor = float(rank)
        kept = (config.get("rank_pattern") or {}).get(f"{trained}.{E}")
        rank = rank if kept is None else sum(map(bool, kept))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise AdapterInvalid(f"Rank or alpha is missing or malformed in {CONFIG_FILE} of {name}: {error!r}.") from error
    if rank == 0 and own is None:
        return None
    if own is not None and (ranknum := own.parts.pop(RANKS, None)) is not None:
        # PEFT divides by the rank before any was pruned, and doesn't save it since 0.18.
        divisor = _number(name, own.names[RANKS], ranknum)
    parts = _require_parts(name, module, own, {A: (rank, site.d_in), B: (site.d_out, rank), E: (rank, 1)})
    a, b, e = parts[A], parts[B], parts[E].float().flatten()
    alive = e != 0
    scale = (alpha if alpha > 0 else float(rank)) / (divisor + 1e-5)
    return AdapterModule(a[alive], b.float()[:, alive] * (e[alive] * scale), 1.0) if alive.any() else None


def _number(name: str, tensor: str, value: torch.Tensor) -> float:
    if value.numel() != 1:
        raise AdapterInvalid(f"'{tensor}' of the adapter in {name} is {list(value.shape)}; it must be one number.")
    return value.float().item()


def _rank_and_scale(name: str, module: str, config: Mapping[str, Any], rank: Any, alpha: Any) -> tuple[int, float]:
    """A module's rank and scale; `rank` and `alpha` are the values of its patterns, None if it has none."""
    try:
        rank = int(config["r"] if rank is None else rank)
        alpha = float(config["lora_alpha"] if alpha is None else alpha)
    except (KeyError, TypeError, ValueError) as error:
        raise AdapterInvalid(f"Rank or alpha is missing or malformed in {CONFIG_FILE} of {name}: {error!r}.") from error
    if rank < 1 or not math.isfinite(alpha):
        raise AdapterInvalid(
            f"'{module}' of the adapter in {name} has rank {rank} and alpha {alpha:g}; the rank must be at least 1, "
            "and the alpha finite."
        )
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _require_parts(
    name: str, module: str, own: FileModule | None, required: Mapping[str, tuple[int, ...]]
) -> dict[str, torch.Tensor]:
    """The module's parts, which must be exactly those in `required`, with these shapes."""
    present = {} if own is None else own.parts
    for part, shape in required.items():
        if part not in present:
            raise AdapterInvalid(
                f"The adapter in {name} lacks '{file_name(module, part)}': its {CONFIG_FILE} requires "
                f"{_listed(required)} for '{module}', and {WEIGHTS_FILE} holds {_listed(present) or 'none'}. Save or "
                "copy the whole adapter again."
            )
        if tuple(present[part].shape) != shape:
            raise AdapterInvalid(
                f"'{_named(own, part)}' of the adapter in {name} is {list(present[part].shape)}; by its {CONFIG_FILE} "
                f"and this base, it must be {list(shape)}.{_hint(present[part])}"
            )
    for part in present:
        if part not in required:
            raise AdapterInvalid(
                f"The adapter in {name} holds '{_named(own, part)}'; by its {CONFIG_FILE}, '{module}' has only "
                f"{_listed(required)}."
            )
    return present


def _hint(tensor: torch.Tensor) -> str:
    if tensor.numel() and tensor.ndim > 1:
        return ""
    return " DeepSpeed ZeRO-3 and FSDP save it like this if the weights were not gathered first."


def _named(own: FileModule | None, part: str) -> str:
    return part if own is None else own.names[part]


def _listed(parts: Iterable[str]) -> str:
    return ", ".join(parts)
