"""An adapter's rows of a training pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

#: A frozen weight [d_out, d_in], or a function that returns it if it is stored in another form. The function is called
#: once in the forward and once in the backward pass; its result is not kept. For a bitsandbytes `Params4bit` (NF4) it
#: is `functools.partial(bitsandbytes.functional.dequantize_4bit, weight.data, weight.quant_state)`.
Frozen = torch.Tensor | Callable[[], torch.Tensor]

#: Dropout compares 16 random bits per element, so its probability is rounded to multiples of 1 / DROPOUT_STEPS.
DROPOUT_STEPS = 2**16


def dense(base: Frozen) -> torch.Tensor:
    """Returns the weight [d_out, d_in]."""
    return base if isinstance(base, torch.Tensor) else base()


@dataclass(frozen=True, slots=True)
class AdapterRows:
    """An adapter's rows of a batch, and its parameters that are not tensors.

    Attributes:
        rows: Its rows.
        scale: Includes the dropout's 1 / (1 - p): every product with the masked x or its gradient also has the scale
            as a factor.
        dropped: The dropout probability in units of 1 / DROPOUT_STEPS.
        seed: Of the dropout.
    """

    rows: tuple[slice, ...]
    scale: float
    dropped: int
    seed: int

    @property
    def count(self) -> int:
        """Number of its rows."""
        return sum(rows.stop - rows.start for rows in self.rows)

    def take(self, whole: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Its rows of `whole`, in order; a view if possible."""
        own = whole[self.rows[0]] if len(self.rows) == 1 else torch.cat([whole[rows] for rows in self.rows])
        return own.to(dtype)

    def add_product(self, whole: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
        """Adds left @ right to its rows of `whole`, in one operation if these are one run of the same dtype."""
        if len(self.rows) == 1 and whole.dtype == left.dtype:
            whole[self.rows[0]].addmm_(left, right)
        else:
            self.add(whole, left @ right)

    def add(self, whole: torch.Tensor, own: torch.Tensor) -> None:
        """Adds to its rows of `whole`, rounding once if that has the narrower dtype."""
        pieces = torch.split(own, [rows.stop - rows.start for rows in self.rows])
        for rows, piece in zip(self.rows, pieces, strict=True):
            whole[rows] += piece

    def put_back(self, whole: torch.Tensor, own: torch.Tensor) -> None:
        """Writes what `take` copied, and was changed since, to its rows of `whole`."""
        for rows, piece in zip(
            self.rows, torch.split(own, [rows.stop - rows.start for rows in self.rows]), strict=True
        ):
            whole[rows] = piece

    def kept(self, rows: int, d_in: int, device: torch.device) -> torch.Tensor | None:
        """The dropout's mask [rows, d_in]; None if nothing is dropped.

        It is drawn in the forward and again in the backward pass: both together cost less than half of one
        `F.dropout`, while stored masks would about double what a layer keeps for its backward pass.
        """
        if not self.dropped:
            return None
        generator = torch.Generator(device).manual_seed(self.seed)
        words = torch.empty(-(-rows * d_in // 4), dtype=torch.int64, device=device)
        words.random_(-(2**63), None, generator=generator)
        return words.view(torch.int16)[: rows * d_in].view(rows, d_in) >= self.dropped - DROPOUT_STEPS // 2
