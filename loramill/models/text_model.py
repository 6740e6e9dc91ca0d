"""The text model of a multimodal checkpoint, written once into the cache.

Adapters apply to it alone, and training, PEFT and the engine then have the same names of its modules. transformers
would load the vision tower as well, whose linears have the names of targets, too.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loramill.errors import BaseUnusable
from loramill.models.fingerprint import weight_files
from loramill.storage.atomic import fsync, share
from loramill.storage.locks import exclusive_lock

#: Architectures of multimodal checkpoints, and those of their text models.
TEXT_ARCHITECTURES = {"Gemma3ForConditionalGeneration": "Gemma3ForCausalLM"}
#: Beginnings of the names of a text model's tensors in such a checkpoint, and what replaces them.
_PREFIXES = {
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.",
}
#: Files that a text model has in common with the checkpoint.
_COPIED = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "generation_config.json", "chat_template*")


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the text model of a checkpoint of `TEXT_ARCHITECTURES`, with the defaults that it leaves out.

    Raises:
        BaseUnusable: transformers can't read it.
    """
    from transformers import AutoConfig

    try:
        own = {name: value for name, value in config["text_config"].items() if name != "model_type"}
        found: dict[str, Any] = AutoConfig.for_model(config["text_config"]["model_type"], **own).to_dict()
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise BaseUnusable(
            f"The text_config of a multimodal checkpoint's config.json can't be read: {error!r}"
        ) from error
    return found | {"architectures": [TEXT_ARCHITECTURES[config["architectures"][0]]]}


def ensure_text_model(folder: Path, config: Mapping[str, Any], cache: Path) -> Path:
    """The folder of a checkpoint's text model, with its tokenizer; written at the first call.

    Args:
        folder: A checkpoint of `TEXT_ARCHITECTURES`.
        config: Its config.json.
        cache: Folder for the text model, which takes as much disk as its weights.

    Raises:
        BaseUnusable: Files are missing or damaged.
        OSError: The disk is full, or a file can't be read.
    """
    files = weight_files(folder)
    stats = [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    key = hashlib.sha256(json.dumps([stats, config], sort_keys=True).encode()).hexdigest()[:16]
    target = cache / "bases" / f"text-{key}"
    if target.is_dir():  # without a lock, so that the cache may be read-only
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(target.with_suffix(".lock")):
        if not target.is_dir():
            building = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=target.parent))
            try:
                _write(folder, text_config(config), files, building)
                building.chmod(0o755)
                building.rename(target)
                fsync(target.parent)
            finally:
                shutil.rmtree(building, ignore_errors=True)
    return target


def _write(folder: Path, config: Mapping[str, Any], files: Sequence[Path], out: Path) -> None:
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save_file

    owners: dict[str, str] = {}
    for number, file in enumerate(files, start=1):
        shard = f"model-{number:05d}.safetensors"
        try:
            with safe_open(file, framework="pt") as opened:
                names = {name: _renamed(name) for name in opened.keys()}  # noqa: SIM118  # it has no __iter__
                tensors = {new: opened.get_tensor(name) for name, new in names.items() if new is not None}
                if tensors:
                    save_file(tensors, out / shard, metadata={"format": "pt"})
                    share(out / shard)
        except SafetensorError as error:
            raise BaseUnusable(f"{file} is damaged: {error}. Copy or download the folder again.") from error
        owners |= dict.fromkeys(tensors, shard)
    (out / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    (out / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": owners}), encoding="utf-8"
    )
    for pattern in _COPIED:
        for file in folder.glob(pattern):
            shutil.copyfile(file, out / file.name)
    for path in (*out.iterdir(), out):
        fsync(path)


def _renamed(name: str) -> str | None:
    """The name of a tensor in the text model; None if it is not part of that."""
    return next((new + name.removeprefix(old) for old, new in _PREFIXES.items() if name.startswith(old)), None)
