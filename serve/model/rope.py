"""Rotary position embedding (Su et al. 2021, eq. 34), in the half-split layout of Hugging Face checkpoints."""

from __future__ import annotations

import math

import torch

from loramill.serve.model.config import Rope


def inverse_frequencies(rope: Rope, head_dim: int) -> torch.Tensor:
    """The angle a position adds, for each pair of channels: [head_dim / 2] float32, in radians."""
    frequencies = 1.0 / (rope.theta ** (torch.arange(0, head_dim, 2).float() / head_dim))
    if rope.kind == "linear":
        return frequencies / rope.factors["factor"]
    if rope.kind == "llama3":
        return _llama3(frequencies, rope)
    return frequencies


def _llama3(frequencies: torch.Tensor, rope: Rope) -> torch.Tensor:
    # Llama 3.1: long waves are stretched by the factor, short ones kept, those between are blended.
    turns = rope.factors["original_context"] * frequencies / (2 * math.pi)
    low, high = rope.factors["low_freq_factor"], rope.factors["high_freq_factor"]
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return kept * frequencies + (1 - kept) * frequencies / rope.factors["factor"]


def angles(positions: torch.Tensor, frequencies: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine for positions [rows]: two of [rows, head_dim / 2] float32."""
    turns = positions.float()[:, None] * frequencies
    return turns.cos(), turns.sin()
