"""A base that loads fast."""

from __future__ import annotations

import pytest

from loramill.models.catalog import Base

from ..llama import tiny_llama, write_base

VOCABULARY = 101


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory) -> Base:
    """A tiny random Llama."""
    model = tiny_llama(
        vocab_size=VOCABULARY,
        max_position_embeddings=1024,
        initializer_range=0.25,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    folder = write_base(tmp_path_factory.mktemp("tiny"), model)
    return Base("tiny", folder, "0" * 64, "LlamaForCausalLM", 1024)
