"""A whole model as a Hugging Face folder: what transformers, vLLM and `find_base` load."""

from __future__ import annotations

import shutil
import stat
from pathlib import Path

from transformers import PreTrainedModel

from loramill.models.catalog import quiet_transformers

#: Ends of the files that a tokenizer, its template, and the defaults of generation lie in.
_COPIED_SUFFIXES = (".json", ".jinja", ".txt", ".model")


def save_hf_model(model: PreTrainedModel, source: Path, folder: Path) -> None:
    """Writes `model` in its dtype, with all that isn't weights from the folder `like`.

    Args:
        folder: is there, and empty.
    """
    with quiet_transformers():
        model.save_pretrained(folder)
    # safetensors writes files that only their owner can read; another user's vLLM must be able to read all of them.
    mode = stat.S_IMODE((folder / "config.json").stat().st_mode)
    for file in folder.glob("*.safetensors"):
        file.chmod(mode)
    there = {file.name for file in folder.iterdir()}
    for file in source.iterdir():
        if file.name not in there and file.suffix in _COPIED_SUFFIXES and not file.name.endswith(".index.json"):
            shutil.copyfile(file, folder / file.name)
