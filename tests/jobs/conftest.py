"""Folders of bases that train in milliseconds: one that can be served too, and one with the real tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from loramill.kernels.quantization import Quantization
from loramill.models.catalog import Base, find_base

from ..llama import tiny_llama, write_base

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def tiny_base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama in bfloat16 with a tokenizer of bytes."""
    folder = tmp_path_factory.mktemp("bases") / "tiny"
    model = tiny_llama(
        torch.bfloat16,
        vocab_size=272,
        hidden_size=64,
        intermediate_size=96,
        initializer_range=0.2,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=257,
    )
    write_base(folder, model)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in ("<|im_start|>", "<|im_end|>")])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "chat_template": TEMPLATE}))
    return folder


@pytest.fixture(scope="session")
def tiny_chat_base(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama that reads as the real base."""
    model = tiny_llama(
        vocab_size=49152,
        hidden_size=16,
        intermediate_size=32,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        initializer_range=0.25,
        tie_word_embeddings=True,
    )
    return write_base(tmp_path_factory.mktemp("bases") / "tiny_chat_base", model, tokenizer=base.folder)


def base_of(folder: Path, tmp_path: Path, quantization: Quantization = "none") -> Base:
    return find_base(str(folder), tmp_path / "cache", quantization)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """With several, MKL divides float32 products in ways that depend on the number of rows."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)
