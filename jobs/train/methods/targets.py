"""Which linears of a base a job adapts, each with its rank and scale. The rules are PEFT's."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from peft.utils.other import get_pattern_key
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from loramill.errors import AdapterInvalid
from loramill.types import ALL_LINEAR, JobSpec

# The first number in a module's path is its layer's, as in "model.layers.3.mlp.experts.0.up_proj".
_LAYER = re.compile(r".*?\.[^.]*\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class TargetModule:
    """A linear that a job adapts.

    Attributes:
        name: its path in the base.
        parent: the module that holds it, under the last part of the name.
        linear: torch's or bitsandbytes' linear, or GPT-2's Conv1D.
        rank, scale: of the adapter there.
    """

    name: str
    parent: nn.Module
    linear: nn.Linear | Conv1D
    rank: int
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        """The linear's d_out and d_in."""
        if isinstance(self.linear, Conv1D):
            d_in, d_out = self.linear.weight.shape
            return d_out, d_in
        return self.linear.out_features, self.linear.in_features

    @property
    def device(self) -> torch.device:
        """Where the linear lies."""
        return self.linear.weight.device


def find_target_modules(model: PreTrainedModel, spec: JobSpec) -> list[TargetModule]:
    """The linears that `spec` adapts, in the base's order.

    Raises:
        AdapterInvalid: a target, a layer or a pattern matches nothing, or a rank is below 1; `param` says which.
    """
    modules = dict(model.named_modules())
    linears = {name: module for name, module in modules.items() if isinstance(module, nn.Linear | Conv1D)}
    names = _within(_targeted(model, linears, spec.targets), spec)
    _check_patterns("rank_pattern", spec.rank_pattern, names)
    _check_patterns("alpha_pattern", spec.alpha_pattern, names)
    return [
        TargetModule(name, modules[name.rpartition(".")[0]], linears[name], rank_of(spec, name), scale_of(spec, name))
        for name in names
    ]


def rank_of(spec: JobSpec, module: str) -> int:
    """The rank of the module's adapter.

    Raises:
        AdapterInvalid: it is below 1.
    """
    rank = spec.rank_pattern.get(get_pattern_key(list(spec.rank_pattern), module), spec.rank)
    if rank < 1:
        raise AdapterInvalid(f"'rank_pattern' gives {module} the rank {rank}: give 1 or more.", param="rank_pattern")
    return rank


def scale_of(spec: JobSpec, module: str) -> float:
    """What the product of the module's B and A is multiplied by."""
    alpha = spec.alpha_pattern.get(get_pattern_key(list(spec.alpha_pattern), module), spec.alpha)
    rank = rank_of(spec, module)
    return alpha / (math.sqrt(rank) if spec.rslora else rank)


def _targeted(model: PreTrainedModel, linears: Mapping[str, nn.Linear | Conv1D], targets: tuple[str, ...]) -> list[str]:
    """The names of the linears that `targets` mean. The head is no part of all linears: it is often the embedding."""
    base = type(model).__name__
    if ALL_LINEAR in targets:
        if len(targets) > 1:
            raise AdapterInvalid(f"'{ALL_LINEAR}' stands alone: leave the other targets out.", param="targets")
        head = model.get_output_embeddings()
        return [name for name, linear in linears.items() if linear is not head]
    missing = [target for target in targets if not any(_ends(name, target) for name in linears)]
    if missing:
        known = ", ".join(sorted({name.rpartition(".")[2] for name in linears}))
        raise AdapterInvalid(
            f"The base ({base}) has no linears named {', '.join(sorted(missing))}: leave them out of 'targets', or "
            f"give '{ALL_LINEAR}' or some of {known}.",
            param="targets",
        )
    return [name for name in linears if any(_ends(name, target) for target in targets)]


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _within(names: list[str], spec: JobSpec) -> list[str]:
    """Those of `names` that lie in the spec's layers, and those that are targets in full: the head lies in none."""
    if spec.layers is None:
        return names
    layer_of = {name: int(match[1]) for name in names if (match := _LAYER.match(name))}
    missing = sorted(set(spec.layers) - set(layer_of.values()))
    if missing or not spec.layers:
        there = f"{min(layer_of.values())} to {max(layer_of.values())}" if layer_of else "none"
        raise AdapterInvalid(
            f"'layers' names {', '.join(map(str, missing)) or 'none'}; the base's layers with these targets are "
            f"{there}: correct 'layers', or leave it out for all.",
            param="layers",
        )
    return [name for name in names if name in spec.targets or layer_of.get(name) in spec.layers]


def _check_patterns(param: str, patterns: Iterable[str], names: list[str]) -> None:
    for pattern in patterns:
        try:
            matches = any(get_pattern_key([pattern], name) == pattern for name in names)
        except re.error as error:
            raise AdapterInvalid(f"'{param}': '{pattern}' is no regular expression: {error}.", param=param) from error
        if not matches:
            raise AdapterInvalid(
                f"'{param}': '{pattern}' matches the end of none of the {len(names)} adapted modules, such as "
                f"{names[0]}: correct it or leave it out.",
                param=param,
            )
