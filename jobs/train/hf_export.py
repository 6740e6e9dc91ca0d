"""A whole model as a Hugging Face folder: what transformers, vLLM and `find_base` load."""

from __future__ import annotations

import shutil
import stat
from pathlib import Path

from transformers import PreTrainedModel

from loramill.models.catalog import quiet_transformers

#: Ends of the files that a tokenizer, its template, and the defaults of generation lie in.
_BESIDES = (".json", ".jinja", ".txt", ".model")


def write_whole(model: PreTrainedModel, like: Path, folder: Path) -> None:
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
    for file in like.iterdir():
        if file.name not in there and file.suffix in _BESIDES and not file.name.endswith(".index.json"):
            shutil.copyfile(file, folder / file.name)
