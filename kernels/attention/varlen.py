"""Attention over sequences of any lengths without a mask: FlashAttention 2 as torch contains it, and its reference.

The rows of all sequences follow one another, and so do their keys; the causal mask is aligned to the end of each
sequence (bottom right), so that new rows behind a prefix see the whole prefix. Query heads share KV heads without
copies of them (Dao 2023, arXiv 2307.08691).

`torch.nn.attention.varlen` is the public form, but takes fewer KV heads than query heads only from torch 2.12; the
operators below it have had these arguments since 2.5 (read in 2.11 and 2.13). Their kernels take any distance between
rows and heads, start on the current stream, read the sequences' boundaries on the device, and have nothing to compile
or plan for a new length.

On a CPU the same functions compute in float32, sequence by sequence: tests compare the code around the operators there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from loramill.kernels.memory import to_device


@dataclass(frozen=True, slots=True)
class VarlenBatch:
    """The boundaries of sequences in their rows and keys.

    Attributes:
        row_starts: int32 [sequences + 1] on the device: the first row of each sequence, and the number of rows.
        key_starts: int32 [sequences + 1] on the device, likewise.
        longest_rows: Number of rows of the sequence that has the most.
        longest_keys: Number of keys of the sequence that has the most.
    """

    row_starts: torch.Tensor
    key_starts: torch.Tensor
    longest_rows: int
    longest_keys: int

    @classmethod
    def of(cls, rows: Sequence[int], keys: Sequence[int], device: torch.device) -> VarlenBatch:
        """The batch of sequences with these numbers of rows and keys, at least one each."""
        starts = to_device(np.stack([starts_of(rows), starts_of(keys)]), device)
        return cls(starts[0], starts[1], max(rows), max(keys))


def starts_of(sizes: Iterable[int]) -> NDArray[np.int32]:
    """The starts of adjacent parts with these sizes, and their end: int32 [parts + 1]."""
    return np.fromiter(accumulate(sizes, initial=0), np.int32)


def is_supported(dtype: torch.dtype, head_dim: int, *, backward: bool = False) -> bool:
    """Whether FlashAttention 2 has kernels for these numbers on every GPU from compute capability 8.0.

    The backward kernels for more than 192 and up to 224 channels need the shared memory of an A100 or H100.
    """
    if dtype not in (torch.float16, torch.bfloat16) or head_dim % 8 or head_dim > 256:
        return False
    return not (backward and 192 < head_dim <= 224)


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    batch: VarlenBatch,
    *,
    scale: float,
    causal: bool = True,
    window: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(scale Q K^T) V of each sequence.

    Args:
        q: [rows, heads, head_dim], with adjacent channels.
        k, v: [keys, KV heads, head_dim], with adjacent channels.
        batch: The sequences.
        scale: Factor of the scores.
        causal: The last row of a sequence sees all of its keys, and each row before it one key less.
        window: Number of keys that a row sees at most, its own included; only if causal.

    Returns:
        The output [rows, heads, head_dim], and the logarithm of the sums of exp(score), float32 [heads, rows].
    """
    if q.device.type == "cpu":
        return _reference_forward(q, k, v, batch, scale, causal, window)
    q, k, v = (_aligned(part) for part in (q, k, v))
    out, logsumexp, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, batch.row_starts, batch.key_starts, batch.longest_rows, batch.longest_keys,
        0.0, causal, False, scale=scale, **_window(causal, window),
    )  # fmt: skip
    return out, logsumexp


def backward(
    d_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    batch: VarlenBatch,
    *,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    deterministic: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of q, k and v.

    `out` and `logsumexp` may be those of attention to more keys than `k`: the gradients are then the part that these
    keys contribute.

    Args:
        d_out: The gradient of `out`.
        q, k, v, batch, scale, causal, window: As for `forward`.
        out, logsumexp: Its results, contiguous.
        deterministic: Sum each gradient in one order. The kernel adds float32 gradients of q with atomics otherwise;
            in one order it writes up to (multiprocessors / (sequences * heads)) copies of them, and adds these up.
    """
    if q.device.type == "cpu":
        return _reference_backward(d_out, q, k, v, out, logsumexp, batch, scale, causal, window)
    q, k, v = (_aligned(part) for part in (q, k, v))
    unused = torch.empty(2, dtype=torch.uint64, device=q.device)  # the state of dropout
    with _deterministic(deterministic):
        gradients: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = torch.ops.aten._flash_attention_backward(
            d_out, q, k, v, out, logsumexp, batch.row_starts, batch.key_starts, batch.longest_rows, batch.longest_keys,
            0.0, causal, unused, unused, scale=scale, **_window(causal, window),
        )  # fmt: skip
    return gradients


def _aligned(part: torch.Tensor) -> torch.Tensor:
    """The tensor itself if the kernels can read 16 bytes at a time from each of its rows and heads, else a copy."""
    size = part.element_size()
    starts = part.data_ptr(), *(stride * size for stride in part.stride()[:-1])
    return part.clone(memory_format=torch.contiguous_format) if any(start % 16 for start in starts) else part


def _window(causal: bool, window: int | None) -> dict[str, int | None]:
    """Numbers of keys before and behind a row's own that it sees; None for all of them."""
    return {
        "window_size_left": None if window is None else window - 1,
        "window_size_right": 0 if causal else None,
    }


@contextmanager
def _deterministic(enabled: bool) -> Iterator[None]:
    """Sets torch's global switch, the only one that FlashAttention's backward pass reads.

    Only around that call: elsewhere it refuses operations, and fills what `torch.empty` returns.
    """
    if not enabled:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _reference_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    batch: VarlenBatch,
    scale: float,
    causal: bool,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    out = torch.empty_like(q)
    logsumexp = torch.empty(q.shape[1], len(q), dtype=torch.float32)
    for rows, keys in _sequences(batch):
        scores = _scores(q[rows], k[keys], scale, causal, window)
        logsumexp[:, rows] = sums = torch.logsumexp(scores, -1)
        weights = (scores - sums[..., None]).exp()
        out[rows] = torch.einsum("hrk,khd->rhd", weights, _per_head(v[keys], q.shape[1])).to(out.dtype)
    return out, logsumexp


def _reference_backward(
    d_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    batch: VarlenBatch,
    scale: float,
    causal: bool,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    heads, kv_heads = q.shape[1], k.shape[1]
    gradients = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    for rows, keys in _sequences(batch):
        wide_k, wide_v, wide_d = _per_head(k[keys], heads), _per_head(v[keys], heads), d_out[rows].float()
        weights = (_scores(q[rows], k[keys], scale, causal, window) - logsumexp[:, rows, None]).exp()
        d_weights = torch.einsum("rhd,khd->hrk", wide_d, wide_v)
        d_scores = weights * (d_weights - (wide_d * out[rows].float()).sum(-1).T[..., None]) * scale
        d_q = torch.einsum("hrk,khd->rhd", d_scores, wide_k)
        d_k = torch.einsum("hrk,rhd->khd", d_scores, q[rows].float())
        d_v = torch.einsum("hrk,rhd->khd", weights, wide_d)
        d_k, d_v = (part.view(len(part), kv_heads, -1, part.shape[2]).sum(2) for part in (d_k, d_v))
        for gradient, part, found in zip(gradients, (rows, keys, keys), (d_q, d_k, d_v), strict=True):
            gradient[part] = found.to(gradient.dtype)
    return gradients


def _sequences(batch: VarlenBatch) -> Iterator[tuple[slice, slice]]:
    """The rows and keys of each sequence."""
    for rows, keys in zip(pairwise(batch.row_starts.tolist()), pairwise(batch.key_starts.tolist()), strict=True):
        yield slice(*rows), slice(*keys)


def _scores(q: torch.Tensor, k: torch.Tensor, scale: float, causal: bool, window: int | None) -> torch.Tensor:
    """The scores of a sequence, float32 [heads, rows, keys]; those that a row does not see are -inf."""
    scores = torch.einsum("rhd,khd->hrk", q.float(), _per_head(k, q.shape[1])) * scale
    if causal:
        ahead = torch.arange(len(k)) - torch.arange(len(k) - len(q), len(k))[:, None]
        hidden = ahead > 0 if window is None else (ahead > 0) | (ahead <= -window)
        scores.masked_fill_(hidden, -torch.inf)
    return scores


def _per_head(part: torch.Tensor, heads: int) -> torch.Tensor:
    """Keys or values in float32, [keys, heads, head_dim]."""
    return part.float().repeat_interleave(heads // part.shape[1], 1)
