"""Tiny random models of the families of transformers that loramill trains by its own operations."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

#: Names of transformers' model types, by the first part of the names of their classes.
FAMILIES = {
    "Llama": "llama",
    "Mistral": "mistral",
    "Qwen2": "qwen2",
    "Qwen3": "qwen3",
    "Qwen3Moe": "qwen3_moe",
    "Gemma2": "gemma2",
    "Gemma3": "gemma3_text",
}


SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "sliding_window": 64,
    "pad_token_id": 0,
}
#: Of Qwen 3's mixture of experts, whose second layer has none.
MIXTURE = {"moe_intermediate_size": 16, "num_experts": 6, "num_experts_per_tok": 2, "mlp_only_layers": [1]}


def tiny_family(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """A frozen model of SIZES with `changes` and random norms."""
    config = AutoConfig.for_model(FAMILIES[family], **SIZES | (MIXTURE if family == "Qwen3Moe" else {}) | changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            if "norm" in name:
                torch.nn.init.normal_(parameter)
    frozen: PreTrainedModel = model.to(dtype).requires_grad_(False).eval()
    return frozen
