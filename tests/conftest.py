"""Fixtures that several rooms share."""

from __future__ import annotations

from pathlib import Path

import pytest

from loramill.bases import Base, find_base
from loramill.chat import ChatTokenizer


@pytest.fixture(scope="session")
def base() -> Base:
    """The real SmolLM2-135M, converted once a machine."""
    return find_base("smollm2-135m", Path("~/.cache/loramill").expanduser())


@pytest.fixture(scope="session")
def tokenizer(base: Base) -> ChatTokenizer:
    """The real base's tokenizer."""
    return ChatTokenizer.load(base.folder)
