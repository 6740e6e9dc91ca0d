"""Which linears of a base a job adapts, with what rank and scale. The rules are PEFT's."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from loramill.errors import InvalidRequest
from loramill.types import ALL_LINEAR, JobSpec

_T = TypeVar("_T", int, float)
_LAYER = re.compile(r"\.(\d+)\.")


def layer_of(name: str) -> int | None:
    """The index of a module's layer: the first number in its path, as in `model.layers.3.mlp.experts.0.up_proj`."""
    found = _LAYER.search(f".{name}.")
    return int(found[1]) if found else None


def find_targets(spec: JobSpec, names: Sequence[str], head: str | None = None) -> list[str]:
    """Names of the linears that a job adapts, in the order of `names`.

    A target matches the full name of a linear, or the last parts of one.

    Args:
        spec: its targets, layers and patterns count.
        names: full names of the base's linears.
        head: the output head among `names`; "all-linear" leaves it out, since it is often the embedding.

    Raises:
        InvalidRequest: a target, layer or pattern matches nothing, or a rank is below 1; `param` is loramill.targets,
            .layers, .rank_pattern or .alpha_pattern.
    """
    chosen = _in_layers(_targeted(spec.targets, names, head), spec)
    _check_patterns("rank_pattern", spec.rank_pattern, chosen)
    _check_patterns("alpha_pattern", spec.alpha_pattern, chosen)
    for name in chosen:
        rank_of(spec, name)
    return chosen


def rank_of(spec: JobSpec, name: str) -> int:
    """The rank of a linear's adapter.

    Raises:
        InvalidRequest: it is below 1.
    """
    rank = _by_pattern(spec.rank_pattern, name, spec.rank)
    if rank < 1:
        raise InvalidRequest(
            f"'rank_pattern' gives {name} the rank {rank}: give 1 or more.", param="loramill.rank_pattern"
        )
    return rank


def scale_of(spec: JobSpec, name: str) -> float:
    """The factor of the product of a linear's B and A."""
    rank = rank_of(spec, name)
    return _by_pattern(spec.alpha_pattern, name, spec.alpha) / (math.sqrt(rank) if spec.rslora else rank)


def _targeted(targets: tuple[str, ...], names: Sequence[str], head: str | None) -> list[str]:
    if ALL_LINEAR in targets:
        if len(targets) > 1:
            raise InvalidRequest(
                f"'{ALL_LINEAR}' must be the only target: leave the others out.", param="loramill.targets"
            )
        return [name for name in names if name != head]
    missing = [target for target in targets if not any(_ends_with(name, target) for name in names)]
    if missing:
        known = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names))
        raise InvalidRequest(
            f"The base has no linears named {', '.join(missing)}: leave them out of 'targets', or give "
            f"'{ALL_LINEAR}' or some of {known}.",
            param="loramill.targets",
        )
    return [name for name in names if any(_ends_with(name, target) for target in targets)]


def _in_layers(names: list[str], spec: JobSpec) -> list[str]:
    """Those of `names` in the spec's layers, and those that are targets in full: the head is in no layer."""
    if spec.layers is None:
        return names
    layers = {name: layer for name in names if (layer := layer_of(name)) is not None}
    missing = sorted(set(spec.layers) - set(layers.values()))
    if missing or not spec.layers:
        known = f"{min(layers.values())} to {max(layers.values())}" if layers else "none"
        raise InvalidRequest(
            f"'layers' names {', '.join(map(str, missing)) or 'none'}; the base's layers with these targets are "
            f"{known}: correct 'layers', or leave it out to adapt all.",
            param="loramill.layers",
        )
    return [name for name in names if name in spec.targets or layers.get(name) in spec.layers]


def _ends_with(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _by_pattern(patterns: Mapping[str, _T], name: str, default: _T) -> _T:
    return next((value for pattern, value in patterns.items() if _matches(pattern, name)), default)


def _matches(pattern: str, name: str) -> bool:
    """As PEFT's `get_pattern_key`, which a test compares this with."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def _check_patterns(field: str, patterns: Iterable[str], names: Sequence[str]) -> None:
    for pattern in patterns:
        try:
            found = any(_matches(pattern, name) for name in names)
        except re.error as error:
            raise InvalidRequest(
                f"'{field}': '{pattern}' is not a regular expression: {error}.", param=f"loramill.{field}"
            ) from error
        if not found:
            raise InvalidRequest(
                f"'{field}': '{pattern}' matches the end of none of the {len(names)} adapted linears' names, such as "
                f"{names[0]}: correct it or leave it out.",
                param=f"loramill.{field}",
            )
