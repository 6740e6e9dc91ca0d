"""PEFT folders: the files that an import uploads, and the files that an export adds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from loramill.errors import InvalidRequest

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
#: Form field of an import -> name of its file.
ADAPTER_FILES: Mapping[str, str] = {"config": CONFIG_FILE, "weights": WEIGHTS_FILE}
#: Files of a base that make up its tokenizer.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)

_CARD = """---
base_model: {base}
library_name: peft
pipeline_tag: text-generation
tags:
- lora
---

# {name}

A LoRA adapter for `{base}`, version `{version}`, exported from loramill.

```python
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```
"""


def adapter_file(folder: Path, name: str) -> tuple[str, bytes]:
    """Reads a file for an upload; returns its name and content.

    Raises:
        InvalidRequest: The file is missing or can't be read.
    """
    path = folder / name
    if not path.is_file():
        raise InvalidRequest(f"{folder} has no {name}{_hint(folder, name)}.")
    try:
        return name, path.read_bytes()
    except OSError as error:
        raise InvalidRequest(f"{path} can't be read: {error.strerror}.") from error


def _hint(folder: Path, name: str) -> str:
    if name == WEIGHTS_FILE and (folder / "adapter_model.bin").is_file():
        return (
            "; its adapter_model.bin is a pickle, which can run any code and is not read. If you trust it, convert it: "
            f"safetensors.torch.save_file(torch.load('adapter_model.bin', weights_only=True), '{WEIGHTS_FILE}')"
        )
    inside = find_subfolder(folder, name)
    return f"; its folder {inside.name} has one: use that folder" if inside else ""


def find_subfolder(folder: Path, name: str) -> Path | None:
    """Finds a subfolder with the file `name`; PEFT saves several adapters into subfolders."""
    return next((path.parent for path in sorted(folder.glob(f"*/{name}"))), None)


def complete_export(folder: Path, name: str, version: str, base: str) -> None:
    """Adds the base's name and a model card to the files of a version.

    Args:
        folder: Folder with the files.
        name: Name of the adapter.
        version: Id of the version.
        base: Hub id or folder, for `from_pretrained`.
    """
    path = folder / CONFIG_FILE
    config = json.loads(path.read_bytes())
    config["base_model_name_or_path"] = base
    path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
    (folder / "README.md").write_text(_CARD.format(base=base, name=name, version=version), encoding="utf-8")
