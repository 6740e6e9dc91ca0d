"""The files of a Hugging Face folder that contain chat templates."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loramill.errors import BaseUnusable


def read_templates(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """The chat templates of a Hugging Face folder by name, as transformers finds them.

    `chat_template.jinja` and `additional_chat_templates/*.jinja` come before `chat_template` in tokenizer_config.json
    (a text, or a list of named ones), and that before chat_template.json.

    Args:
        folder: the base's folder.
        settings: the content of tokenizer_config.json.

    Raises:
        BaseUnusable: a file can't be read, or does not contain a template.
    """
    files = {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if (default := folder / "chat_template.jinja").is_file():
        files["default"] = default
    try:
        if files:
            return {name: path.read_text(encoding="utf-8") for name, path in files.items()}
        if settings.get("chat_template"):
            return templates_by_name(settings["chat_template"])
        legacy = folder / "chat_template.json"
        return templates_by_name(json.loads(legacy.read_bytes())["chat_template"]) if legacy.is_file() else {}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise BaseUnusable(f"the chat template can't be read: {error!r}. Copy the folder again.") from error


def templates_by_name(value: object) -> dict[str, str]:
    """The `chat_template` of a JSON file as templates by name.

    Raises:
        TypeError, KeyError: it is not a chat template.
    """
    if isinstance(value, list):
        value = {entry["name"]: entry["template"] for entry in value}
    named = value if isinstance(value, dict) else {"default": value} if value else {}
    templates = {name: template for name, template in named.items() if isinstance(template, str)}
    if len(templates) < len(named):
        raise TypeError("a chat template is a text")
    return templates
