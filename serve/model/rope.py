"""Rotary position embedding (Su et al. 2021, eq. 34), in the half-split layout of Hugging Face checkpoints."""

from __future__ import annotations

import math

import torch

from loramill.serve.model.config import Rope


def inverse_frequencies(rope: Rope, head_dim: int) -> torch.Tensor:
    """The angle per position of each pair of channels: float32 [head_dim / 2], in radians."""
    frequencies = 1.0 / (rope.theta ** (torch.arange(0, head_dim, 2).float() / head_dim))
    if rope.kind == "linear":
        return frequencies / rope.factors["factor"]
    if rope.kind == "llama3":
        return _llama3(frequencies, rope)
    if rope.kind == "yarn":
        return _yarn(frequencies, rope, head_dim)
    # Also for the dynamic kind: it stretches only beyond the context, which no sequence exceeds here.
    return frequencies


def amplitude(rope: Rope) -> float:
    """Factor of cosine and sine: YaRN's attention temperature, applied to queries and keys alike."""
    return rope.factors.get("attention_factor", 1.0)


def _llama3(frequencies: torch.Tensor, rope: Rope) -> torch.Tensor:
    # Llama 3.1: long waves are stretched by the factor, short ones are kept, those in between are blended.
    turns = rope.factors["original_context"] * frequencies / (2 * math.pi)
    low, high = rope.factors["low_freq_factor"], rope.factors["high_freq_factor"]
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return kept * frequencies + (1 - kept) * frequencies / rope.factors["factor"]


def _yarn(frequencies: torch.Tensor, rope: Rope, head_dim: int) -> torch.Tensor:
    # YaRN (Peng et al. 2023, section 3.2): like Llama 3.1, but blended by channel instead of by turns.
    def channel(turns: float) -> float:
        span = math.log(rope.factors["original_context"] / (turns * 2 * math.pi))
        return head_dim * span / (2 * math.log(rope.theta))

    low, high = channel(rope.factors["beta_fast"]), channel(rope.factors["beta_slow"])
    if rope.factors["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low or 0.001
    stretched = ((torch.arange(head_dim // 2).float() - low) / width).clamp(0.0, 1.0)
    return (1 - stretched) * frequencies + stretched * frequencies / rope.factors["factor"]


def angles(positions: torch.Tensor, frequencies: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine for positions [rows], times `scale`: each float32 [rows, head_dim / 2]."""
    radians = positions.float()[:, None] * frequencies
    return radians.cos().mul_(scale), radians.sin().mul_(scale)
