"""Sorts the tensors of an adapter's file by the base's module and the part of its adapter."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from loramill.errors import AdapterInvalid
from loramill.kernels.peft_folder.base import PREFIX, BaseModules

A, B, E, RANKS = "lora_A", "lora_B", "lora_E", "ranknum"
EMBEDDING_A, EMBEDDING_B = "lora_embedding_A", "lora_embedding_B"
MAGNITUDE = "lora_magnitude_vector"
#: Parts that are the base's own, which PEFT saves with adapters of embeddings and heads.
WEIGHT, BIAS = "weight", "bias"

#: A name ends in the part; then comes the adapter's name, if the trainer saved the model's own state, and `.weight` if
#: the part is a module.
_OF_ADAPTER = re.compile(
    rf"(?P<path>.+)\.(?P<part>{'|'.join((A, B, E, RANKS, EMBEDDING_A, EMBEDDING_B, MAGNITUDE))})"
    r"(?:\.(?P<adapter>(?!(?:weight|bias)$)[^.]+))?(?:\.weight)?"
)
_OF_BASE = re.compile(rf"(?P<path>.+?)(?:\.base_layer)?\.(?P<part>{WEIGHT}|{BIAS})")


@dataclass(frozen=True, slots=True)
class FileModule:
    """The tensors in a file for one module.

    Attributes:
        trained: The module's name in the model that was trained.
        parts: Tensors by part.
        names: The tensors' names in the file, by part.
    """

    trained: str
    parts: dict[str, torch.Tensor]
    names: dict[str, str]


def by_module(folder: str, tensors: Mapping[str, torch.Tensor], base: BaseModules) -> dict[str, FileModule]:
    """Sorts a file's tensors by module.

    Raises:
        AdapterInvalid: A tensor is not part of a supported adapter or of a module of the base, or occurs twice.
    """
    modules: dict[str, FileModule] = {}
    adapters: set[str] = set()
    for name, tensor in tensors.items():
        path, part, adapter = _split(folder, name)
        if adapter is not None:
            adapters.add(adapter)
        if len(adapters) > 1:
            known = ", ".join(sorted(adapters))
            raise AdapterInvalid(f"The file in {folder} holds several adapters ({known}): save one of them alone.")
        found = base.find(path)
        if found is None:
            raise AdapterInvalid(
                f"The adapter in {folder} holds '{name}', and this base has no module '{_plain(path)}' that "
                "can be adapted: it was trained on another base, or saved by a program that renames modules."
            )
        own = modules.setdefault(found[0], FileModule(found[1], {}, {}))
        if part in own.parts:
            raise AdapterInvalid(
                f"The adapter in {folder} holds both '{own.names[part]}' and '{name}', the same part of "
                f"'{found[0]}': keep one."
            )
        own.parts[part], own.names[part] = tensor, name
    return modules


def _split(folder: str, name: str) -> tuple[str, str, str | None]:
    """A tensor's name as the module's path, the part, and the adapter's name, if it has one."""
    for part in (A, B):
        if name.endswith(end := f".{part}.weight"):
            return name.removesuffix(end), part, None
    match = _OF_ADAPTER.fullmatch(name)
    if match is not None:
        return match["path"], match["part"], match["adapter"]
    match = _OF_BASE.fullmatch(name)
    if match is None or ".lora_" in match["path"]:
        raise AdapterInvalid(f"The adapter in {folder} holds '{name}', which is not part of a supported LoRA.")
    return match["path"], match["part"], None


def file_name(module: str, part: str) -> str:
    """PEFT's name of a part in a file."""
    return f"{PREFIX}{module}.{part}" + (".weight" if part in (A, B) else "")


def _plain(path: str) -> str:
    return path.removeprefix(PREFIX)
