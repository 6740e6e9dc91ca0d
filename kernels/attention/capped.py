"""Attention with capped scores in plain torch, whose FlashAttention and SDPA have no cap.

Scores become `cap * tanh(score / cap)` (Gemma 2, arXiv 2408.00118, section 2). They are float32: in bfloat16 those near
a cap of 50 would be multiples of 0.25.
"""

from __future__ import annotations

import torch

#: Number of scores that exist at once in `attend_last`: 128 MiB.
SCORES = 32 << 20


def attend(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, scale: float, cap: float
) -> torch.Tensor:
    """softmax(cap tanh(scale Q K^T / cap)) V.

    Args:
        q: [n, KV heads, rows, d].
        keys, values: [n, KV heads, positions, d].
        mask: bool, broadcast to [n, KV heads, rows, positions]: the positions that a row sees.
        scale: Factor of the scores.
        cap: Bound of the scores.

    Returns:
        [n, KV heads, rows, d].
    """
    scores = _products(q, keys).mul_(scale / cap).tanh_().mul_(cap).masked_fill_(~mask, -torch.inf)
    return scores.softmax(-1).to(values.dtype) @ values


def attend_last(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, cap: float, window: int | None
) -> torch.Tensor:
    """Causal attention of a sequence's last rows, some rows at a time so that their scores stay small.

    Args:
        q: [rows, heads, d], of the last positions.
        keys, values: [positions, KV heads, d].
        scale, cap: See `attend`.
        window: Number of positions that a row sees, including its own; None: all.

    Returns:
        [rows, heads, d].
    """
    (rows, heads, d), (positions, kv_heads, _) = q.shape, keys.shape
    keys, values, group = keys.transpose(0, 1)[None], values.transpose(0, 1)[None], heads // kv_heads
    position, out = torch.arange(positions, device=q.device), torch.empty_like(q)
    for start in range(0, rows, size := max(1, SCORES // (heads * positions))):
        part = slice(start, min(start + size, rows))
        own = position[positions - rows + part.start : positions - rows + part.stop, None]
        mask = position <= own if window is None else (position <= own) & (position > own - window)
        # The query heads of one KV head follow one another as rows, so that no key is repeated.
        grouped = q[part].view(-1, kv_heads, group, d).permute(1, 2, 0, 3)
        done = attend(grouped.flatten(1, 2)[None], keys, values, mask.repeat(group, 1), scale, cap)
        out[part] = done.view(grouped.shape).permute(2, 0, 1, 3).flatten(1, 2)
    return out


def _products(q: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Q K^T in float32."""
    if q.device.type == "cpu" or q.dtype == torch.float32:
        return q.float() @ keys.float().mT
    products = torch.bmm(q.flatten(0, 1), keys.flatten(0, 1).mT, out_dtype=torch.float32)
    return products.view(*q.shape[:-1], keys.shape[-2])
