"""The identity of a base: a hash of its weights, their quantization, and the part of its configuration that matters.

The same weights have the same fingerprint in every folder, in any number of files, and after they were saved again.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

from loramill.errors import BaseUnusable
from loramill.storage.atomic import replace_text
from loramill.storage.safetensors_header import TensorEntry, read_header

_CHUNK = 1 << 22
log = logging.getLogger(__name__)

#: Keys of config.json that don't change the forward pass; every key that is not listed counts. Sliding windows are
#: listed because most configs have one that is not in use; if it is, `catalog` adds it under another key.
_IGNORED_KEYS = {
    "attention_dropout", "bos_token_id", "dtype", "eos_token_id", "initializer_range", "layer_types",
    "max_window_layers", "output_attentions", "output_hidden_states", "pad_token_id", "pretraining_tp",
    "return_dict", "sliding_window", "torch_dtype", "transformers_version", "unk_token_id", "use_cache",
    "use_sliding_window",
}  # fmt: skip


def fingerprint(config: Mapping[str, Any], weights: str, quantization: str) -> str:
    """The sha256 (hex) of a base.

    Args:
        config: the content of config.json.
        weights: the result of `weights_hash`.
        quantization: the quantization of the base when it is loaded, or "none".
    """
    parts = {"config": relevant_config(config), "weights": weights, "quantization": quantization}
    return hashlib.sha256(_canonical(parts)).hexdigest()


def relevant_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of config.json that changes what the model computes, its defaults filled in.

    Absent, null and false mean the same in the served families, so null and false are left out. The rotary
    embedding, which each version of transformers writes in another form, becomes one `rope`.
    """
    relevant = {
        key: value
        for key, value in config.items()
        if value is not None and value is not False and key not in _IGNORED_KEYS and not key.startswith("_")
    }
    rope = {"rope_theta": relevant.pop("rope_theta", 10000.0)}
    rope |= relevant.pop("rope_scaling", {}) | relevant.pop("rope_parameters", {})
    rope["rope_type"] = rope.pop("type", None) or rope.get("rope_type", "default")
    heads = relevant.get("num_attention_heads", 1)
    defaults = {
        "hidden_act": "silu",
        "num_key_value_heads": heads,
        "head_dim": relevant.get("hidden_size", 0) // heads,
    }
    return defaults | relevant | {"rope": rope}


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of a Hugging Face folder: `model.safetensors`, or those its index lists.

    Raises:
        BaseUnusable: there are none, or a file of the index is missing.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return (single,)
    if not index.is_file():
        raise BaseUnusable(
            f"{folder} has no safetensors weights (model.safetensors, or model.safetensors.index.json with its "
            "shards); load it once in transformers and save it again with `save_pretrained`."
        )
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise BaseUnusable(f"{index} is damaged: {error!r}. Copy or download the folder again.") from error
    files = tuple(folder / name for name in names)
    for file in files:
        if not file.is_file():
            raise BaseUnusable(f"{file} is missing though {index.name} lists it. Copy or download the folder again.")
    return files


def weights_hash(files: Sequence[Path], cache: Path) -> str:
    """The sha256 (hex) over all tensors: names, types, shapes and bytes, in order of name.

    The result is cached under `cache` by the files' real paths, sizes and modification times, so that only the first
    call reads the weights (about 1 GB/s). If the cache can't be written to, each call reads them.

    Raises:
        BaseUnusable: a file is not a safetensors file, or is truncated.
        OSError: a file can't be read.
    """
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    known = cache / "weights" / hashlib.sha256(_canonical(stats)).hexdigest()
    if known.is_file() and len(found := known.read_text()) == 64:
        return found
    digest = _hash_tensors(files)
    try:
        known.parent.mkdir(parents=True, exist_ok=True)
        replace_text(known, digest)
    except OSError as error:
        log.warning("the hash of the weights can't be written to %s; every start reads them: %s", known, error)
    return digest


def _hash_tensors(files: Sequence[Path]) -> str:
    tensors = {name: (file, entry) for file in files for name, entry in _tensors(file).items()}
    digest = hashlib.sha256()
    for name, (file, entry) in sorted(tensors.items(), key=itemgetter(0)):
        digest.update(_canonical([name, entry.dtype, entry.shape]))
        with file.open("rb") as stream:
            stream.seek(entry.start)
            for offset in range(entry.start, entry.stop, _CHUNK):
                digest.update(stream.read(min(_CHUNK, entry.stop - offset)))
    return digest.hexdigest()


def _tensors(file: Path) -> Mapping[str, TensorEntry]:
    """The tensors of a safetensors file by name."""
    try:
        with file.open("rb") as stream:
            return read_header(stream, file.stat().st_size).tensors
    except ValueError as error:
        raise BaseUnusable(f"{file} is damaged: {error}. Copy, convert or download it again.") from error


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
