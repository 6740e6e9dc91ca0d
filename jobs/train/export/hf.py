"""Writes a full model as a Hugging Face folder, which transformers, vLLM and `find_base` load."""

from __future__ import annotations

import shutil
import stat
from pathlib import Path

from transformers import PreTrainedModel

from loramill.models.catalog import quiet_transformers

#: Suffixes of the files with the tokenizer, its chat template, and the defaults of generation.
_COPIED_SUFFIXES = (".json", ".jinja", ".txt", ".model")


def save_hf_model(model: PreTrainedModel, source: Path, folder: Path) -> None:
    """Writes `model` in its dtype, and copies all files except weights from the folder `source`.

    Args:
        folder: an existing, empty folder.
    """
    with quiet_transformers():
        model.save_pretrained(folder)
    # safetensors writes files that only their owner can read; the vLLM of another user must be able to read them.
    mode = stat.S_IMODE((folder / "config.json").stat().st_mode)
    for file in folder.glob("*.safetensors"):
        file.chmod(mode)
    existing = {file.name for file in folder.iterdir()}
    for file in source.iterdir():
        if file.name not in existing and file.suffix in _COPIED_SUFFIXES and not file.name.endswith(".index.json"):
            shutil.copyfile(file, folder / file.name)
