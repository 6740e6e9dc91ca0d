"""Fixtures that several rooms share."""

from __future__ import annotations

from pathlib import Path

import pytest

from loramill.data.tokenizer import ChatTokenizer
from loramill.models.catalog import Base, find_base

from .hermes import VOCABULARY, write_hermes_tokenizer
from .llama import tiny_llama, write_base


@pytest.fixture(scope="session")
def base() -> Base:
    """The real SmolLM2-135M, converted once a machine."""
    return find_base("smollm2-135m", Path("~/.cache/loramill").expanduser())


@pytest.fixture(scope="session")
def tokenizer(base: Base) -> ChatTokenizer:
    """The real base's tokenizer."""
    return ChatTokenizer.load(base.folder)


@pytest.fixture(scope="session")
def hermes_base(tmp_path_factory) -> Base:
    """A tiny random Llama that reads bytes and knows tools; it has a few logits more than there are tokens."""
    model = tiny_llama(
        vocab_size=VOCABULARY + 3,
        max_position_embeddings=4096,
        initializer_range=0.25,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    folder = write_base(tmp_path_factory.mktemp("hermes"), model)
    write_hermes_tokenizer(folder)
    return Base("hermes", folder, "1" * 64, "LlamaForCausalLM", 4096)
