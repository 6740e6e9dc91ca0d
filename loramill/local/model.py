"""Finds a model without a gateway: the base of the settings, a version in the registry, or a PEFT folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from loramill.client.adapter_folder import CONFIG_FILE, find_subfolder
from loramill.errors import AdapterInvalid, ModelNotFound
from loramill.models.catalog import Base, find_base
from loramill.names import ModelName
from loramill.registry import Registry, adapters
from loramill.settings import Settings


def find_model(model: str, settings: Settings) -> tuple[Base, str | None, Callable[[str], Path]]:
    """Finds a model by its name or PEFT folder.

    Returns:
        The base, the version (None for the base itself), and a function from the version to its folder.

    Raises:
        ModelNotFound: No base, version or PEFT folder of this name exists, or it is for another base.
        LoramillError: The registry or the artifact can't be read.
    """
    base = find_base(settings.base, settings.cache, settings.quantization)
    folder = Path(model).expanduser()
    if (folder / CONFIG_FILE).is_file():
        return base, str(folder.resolve()), Path
    try:
        name = ModelName.parse(model)
        if name.base not in (None, base.name):
            raise ModelNotFound(f"The model '{model}' does not exist: the base here is '{base.name}'.")
        if name.adapter is None:
            return base, None, Path
        registry = Registry.open(settings.database, settings.artifacts)
        with registry.reading() as session:
            version = adapters.resolve(session, name.adapter, name.selector)
    except ModelNotFound as error:
        if inside := find_subfolder(folder, CONFIG_FILE):
            hint = f"The folder {model} has no {CONFIG_FILE}; its folder {inside.name} contains one: give that folder."
        else:
            hint = f"It is not a folder with an {CONFIG_FILE} either."
        raise ModelNotFound(f"{error.message} {hint}") from error
    if version.base != base.fingerprint:
        raise ModelNotFound(f"The model '{model}' was trained on another base than '{base.name}'.")
    registry.artifacts.fetch(version.id)  # before loading the base, which takes longer
    return base, version.id, registry.artifacts.fetch


def check_gains(folder: Path, base: Base) -> None:
    """Checks that DoRA's gains in the folder of an exported version are those of a base in its quantization.

    Raises:
        AdapterInvalid: they are another base's, and would be applied to this one.
    """
    from loramill.kernels.peft_folder import GAINS_FILE

    if not (folder / GAINS_FILE).is_file():
        return
    try:
        trained_on = json.loads((folder / "loramill.json").read_bytes())["base"]
    except (OSError, ValueError, KeyError, TypeError):
        trained_on = None
    if trained_on != base.fingerprint:
        raise AdapterInvalid(
            f"{GAINS_FILE} in {folder} is not known to be of the base '{base.name}' with quantization "
            f"'{base.quantization}': set `base` and `quantization` to those that the adapter was trained with, or "
            "remove the file; the gains are then computed."
        )
