"""A base that is loaded and trained in no time, and examples for it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from loramill.bases import Base

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


@pytest.fixture(scope="session")
def tiny(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random Llama with SmolLM2's tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.1,
        tie_word_embeddings=True,
    )
    folder = tmp_path_factory.mktemp("tiny")
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in TOKENIZER_FILES:
        if (base.folder / name).exists():
            shutil.copy(base.folder / name, folder)
    return folder


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
