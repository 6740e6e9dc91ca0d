"""A base that loads and trains quickly, and examples for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loramill.models.catalog import Base

from ..llama import tiny_llama, write_base


@pytest.fixture(scope="session")
def tiny(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random Llama with SmolLM2's tokenizer."""
    model = tiny_llama(vocab_size=49152, max_position_embeddings=512, initializer_range=0.1, tie_word_embeddings=True)
    return write_base(tmp_path_factory.mktemp("tiny"), model, tokenizer=base.folder)


@pytest.fixture(scope="session")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train, valid and test.jsonl: the answer is the question's own word."""
    folder = tmp_path_factory.mktemp("examples")
    words = ("red", "blue", "green", "grey")
    for name, count in (("train", 24), ("valid", 8), ("test", 4)):
        rows = (
            {
                "messages": [
                    {"role": "user", "content": f"{words[number % 4]} {name} {number}"},
                    {"role": "assistant", "content": words[number % 4]},
                ]
            }
            for number in range(count)
        )
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
