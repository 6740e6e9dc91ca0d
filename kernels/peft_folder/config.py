"""PEFT's `adapter_config.json`: unsupported features, target modules, and the rank and alpha of each module."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loramill.errors import AdapterInvalid
from loramill.kernels.peft_folder.base import Module

CONFIG_FILE = "adapter_config.json"

#: Settings of PEFT's LoraConfig that change what an adapter computes and can't be expressed in the normal form.
_UNSUPPORTED = (
    "modules_to_save",
    "target_parameters",
    "trainable_token_indices",
    "layer_replication",
    "lora_bias",
    "alora_invocation_tokens",
)
#: Names of settings that enable a variant of LoRA; those in `_HARMLESS` do not change what a saved adapter computes.
_SWITCHES = re.compile(r"use_\w+|\w+_config")
_HARMLESS = (
    "use_rslora",
    "use_dora",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "megatron_config",
    "runtime_config",
)
#: What to do instead.
_INSTEAD = {
    "modules_to_save": "train these modules as LoRA targets (target_modules) instead, or leave modules_to_save out",
    "target_parameters": "experts can't have adapters; train the linears of attention (q_proj, k_proj, v_proj, o_proj)",
    "trainable_token_indices": "train embed_tokens as a LoRA target instead",
}

#: Initializations that change the base's own weights: such an adapter is right only on that changed base.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")

ALL_LINEAR = "all-linear"
_LAYER = r".*?\.[^.]*\.(?P<idx>\d+)\."


def read_config(folder: Path) -> dict[str, Any]:
    """Reads the config in a folder and checks that the adapter is supported.

    Raises:
        AdapterInvalid: The config is missing or unreadable, or the adapter is not supported; the message says why.
    """
    path = folder / CONFIG_FILE
    if not path.is_file() and (inside := sorted(folder.glob(f"*/{CONFIG_FILE}"))):
        raise AdapterInvalid(
            f"{folder.name} has no {CONFIG_FILE}; its folder {inside[0].parent.name} has one: use that folder."
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise AdapterInvalid(f"{CONFIG_FILE} in {folder.name} can't be read: {error}.") from error
    return parse_config(folder.name, text)


def parse_config(name: str, text: str | bytes) -> dict[str, Any]:
    """Parses and checks the config of the adapter `name`; see `read_config`."""
    try:
        config = json.loads(text)
    except ValueError as error:
        raise AdapterInvalid(f"{CONFIG_FILE} in {name} can't be read: {error}.") from error
    if isinstance(config, dict) and ("lora_parameters" in config or "fine_tune_type" in config):
        raise AdapterInvalid(
            f"The adapter in {name} is in MLX-LM's format: convert it to PEFT's, with lora_A.weight as the transposed "
            "lora_a, lora_B.weight as the transposed lora_b, and lora_alpha as its scale times its rank."
        )
    if not isinstance(config, dict) or config.get("peft_type") not in ("LORA", "ADALORA"):
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise AdapterInvalid(
            f"{CONFIG_FILE} in {name} is not a LoRA adapter's (peft_type is {kind!r}): LORA and ADALORA are supported."
        )
    _check_supported(name, config)
    return config


def _check_supported(name: str, config: Mapping[str, Any]) -> None:
    switched = (key for key in config if _SWITCHES.fullmatch(key) and key not in _HARMLESS)
    used = [key for key in (*_UNSUPPORTED, *switched) if config.get(key)]
    if used:
        instead = next((f": {_INSTEAD[key]}" for key in used if key in _INSTEAD), "")
        raise AdapterInvalid(f"The adapter in {name} uses {', '.join(used)}, which isn't supported{instead}.")
    if config.get("bias", "none") != "none":
        raise AdapterInvalid(f"The adapter in {name} trains biases; only bias='none' is supported: train it with that.")
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.startswith(_CHANGES_BASE):
        raise AdapterInvalid(
            f"The adapter in {name} was started with {start}, which changes the base: convert it to the "
            "unmodified base when saving it (path_initial_model_for_weight_conversion)."
        )


class TargetModules:
    """PEFT's rule for the modules of a base that an adapter targets, by their names in training.

    Raises:
        AdapterInvalid: The config has no target_modules, or they are malformed.
    """

    def __init__(self, name: str, config: Mapping[str, Any]) -> None:
        targets, layers = config.get("target_modules"), config.get("layers_to_transform")
        patterns = config.get("layers_pattern") or ()
        try:
            self._all = isinstance(targets, str) and targets.lower() == ALL_LINEAR
            self._targets = _selection(targets)
            self._excluded = _selection(config.get("exclude_modules") or [])
            self._layers = (
                None if layers is None or layers == [] else {layers} if isinstance(layers, int) else {*layers}
            )
            patterns = [patterns] if isinstance(patterns, str) else list(patterns)
            self._numbers = [re.compile(rf"(?:^|.*?\.){each}\.(?P<idx>\d+)\.") for each in patterns]
        except (TypeError, re.error) as error:
            raise AdapterInvalid(
                f"target_modules, exclude_modules or the layers in {CONFIG_FILE} of {name} are missing or malformed: "
                f"{error}."
            ) from error
        self._numbers = self._numbers or [re.compile(_LAYER)]

    def __contains__(self, item: tuple[str, Module]) -> bool:
        """Whether the adapter targets a module, given with its name in training."""
        name, module = item
        if _selects(self._excluded, name):
            return False
        if self._all:
            return not module.lookup and not module.head
        if isinstance(self._targets, re.Pattern):
            return self._targets.fullmatch(name) is not None
        return name in self._targets or (_selects(self._targets, name) and self._in_layers(name))

    def _in_layers(self, name: str) -> bool:
        if self._layers is None:
            return True
        match = next((match for pattern in self._numbers if (match := pattern.match(name))), None)
        return match is not None and int(match["idx"]) in self._layers


def _selection(value: Any) -> re.Pattern[str] | frozenset[str]:
    if isinstance(value, str):
        return re.compile(value)
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise TypeError(f"{value!r} is neither a list of names nor a pattern")
    return frozenset(value)


def _selects(selection: re.Pattern[str] | frozenset[str], name: str) -> bool:
    """Whether a pattern matches the whole name, or a list contains one of its suffixes that start at a dot."""
    if isinstance(selection, re.Pattern):
        return selection.fullmatch(name) is not None
    return bool(selection) and any(end in selection for end in _ends(name))


def _ends(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


class Patterns:
    """PEFT's rule for ranks and alphas: the first key whose regular expression matches a suffix that starts at a dot.

    Plain names are looked up in a dictionary: an adapter may have one per module.

    Raises:
        AdapterInvalid: The patterns are malformed.
    """

    def __init__(self, name: str, config: Mapping[str, Any], key: str) -> None:
        self._plain: dict[str, tuple[int, Any]] = {}
        self._others: list[tuple[int, re.Pattern[str], Any]] = []
        try:
            for index, (pattern, value) in enumerate((config.get(key) or {}).items()):
                if re.fullmatch(r"[\w.]+", pattern):
                    self._plain[pattern] = (index, value)
                else:
                    self._others.append((index, re.compile(rf"(.*\.)?({pattern})$"), value))
        except (AttributeError, re.error) as error:
            raise AdapterInvalid(
                f"Rank or alpha is missing or malformed in {CONFIG_FILE} of {name}: {error!r}."
            ) from error

    def of(self, trained: str, module: str) -> Any:
        """The value for a module, by its name in training or, if none matches, by its name in the base."""
        if not self._plain and not self._others:
            return None
        found = self._first(trained)
        return self._first(module) if found is None and module != trained else found

    def _first(self, name: str) -> Any:
        matching = [self._plain[end] for end in _ends(name) if end in self._plain]
        matching += [(index, value) for index, pattern, value in self._others if pattern.match(name)]
        return min(matching, key=lambda match: match[0])[1] if matching else None
