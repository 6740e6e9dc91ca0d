"""Tiny random Llamas, the bases of tests for which the real one is too slow."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

SIZES = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def tiny_llama(dtype: torch.dtype = torch.float32, *, seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """Random weights from `seed`, of SIZES with `changes`; torch's global generator is left unchanged."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**SIZES | changes)).to(dtype).eval()


def write_base(folder: Path, model: LlamaForCausalLM, tokenizer: Path | None = None) -> Path:
    """Writes a base's folder, with the tokenizer and the generation config of the folder `tokenizer`."""
    model.save_pretrained(folder)
    for file in tokenizer.iterdir() if tokenizer else ():
        if file.name.startswith(("tokenizer", "chat_template", "generation_config")):
            shutil.copy(file, folder)
    return folder
