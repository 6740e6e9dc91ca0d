"""Log probabilities of tokens, for answers and echoed prompts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from loramill.kernels.memory import to_device
from loramill.serve.engine.types import TokenLogprobs

#: Bytes of the largest intermediate tensor on a GPU: rows beyond it are processed in a second batch, and so on.
SLICE_BYTES = 64 << 20

_MAX_ID = 2**31 - 1


def token_logprobs(logits: torch.Tensor, tokens: Sequence[int], tops: Sequence[int]) -> list[TokenLogprobs]:
    """Log probabilities of each row's token and of its most probable tokens, best first.

    An entry does not depend on the other rows.

    Args:
        logits: float32 [rows, vocabulary], as the model returned them.
        tokens: One per row.
        tops: Number of most probable tokens, one per row; capped to the vocabulary.
    """
    if logits.device.type == "cpu":
        return _by_row(logits, tokens, tops)
    return batched_logprobs(logits, tokens, tops)


def _by_row(logits: torch.Tensor, tokens: Sequence[int], tops: Sequence[int]) -> list[TokenLogprobs]:
    logprobs = logits.log_softmax(-1)
    chosen = logprobs[torch.arange(len(tokens)), torch.tensor(tokens, dtype=torch.long)].tolist()
    entries = []
    for row, token, logprob, top in zip(logprobs, tokens, chosen, tops, strict=True):
        # Row by row: which of equal logits comes first may depend on how many are requested.
        values, ids = row.topk(min(top, len(row)))
        entries.append(TokenLogprobs(token, logprob, tuple(zip(ids.tolist(), values.tolist(), strict=True))))
    return entries


def batched_logprobs(logits: torch.Tensor, tokens: Sequence[int], tops: Sequence[int]) -> list[TokenLogprobs]:
    """`token_logprobs` for a GPU: the host waits once; of equal logits the lower token comes first."""
    count = min(max(tops, default=0), logits.shape[1])
    chosen = to_device(np.array(tokens, np.int64)[:, None], logits.device)
    size = max(1, SLICE_BYTES // (8 * logits.shape[1]))
    slices = [slice(start, start + size) for start in range(0, len(tokens), size)]
    parts = [_best(logits[rows], chosen[rows], count) for rows in slices]
    found = torch.cat(parts).tolist() if tokens else []
    return [
        TokenLogprobs(token, numbers[0], tuple((int(id_), value) for id_, value in _pairs(numbers[1:], count, top)))
        for token, numbers, top in zip(tokens, found, tops, strict=True)
    ]


def _best(logits: torch.Tensor, chosen: torch.Tensor, count: int) -> torch.Tensor:
    """The log probability of each row's token, `count` best tokens and their log probabilities, in float64."""
    logprobs = logits.log_softmax(-1)
    # Keys in the order of the numbers and, for equals, against that of the tokens: no two are equal.
    bits = logprobs.view(torch.int32)
    numbers = (bits ^ ((bits >> 31) & _MAX_ID)).long() << 31
    keys = numbers + (_MAX_ID - torch.arange(logits.shape[1], device=logits.device))
    ids = _MAX_ID - (keys.topk(count).values & _MAX_ID)
    return torch.cat([logprobs.gather(1, chosen).double(), ids.double(), logprobs.gather(1, ids).double()], 1)


def _pairs(numbers: Sequence[float], count: int, top: int) -> list[tuple[float, float]]:
    return list(zip(numbers[:count], numbers[count:], strict=True))[:top]
