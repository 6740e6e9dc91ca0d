"""The stage tenants: the rows of several tenants in one pass through a linear of Llama-3-8B, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch

from loramill.kernels.adapter_rows import Frozen
from loramill.kernels.batch import Batch, Slot
from loramill.kernels.training import Trainable, grouped_lora
from loramill.sizing.anatomy import anatomy
from loramill_bench.gpu.bases import has_bitsandbytes, llama
from loramill_bench.gpu.stage import Context
from loramill_bench.results import Result

#: Numbers of tenants, and rows of each.
_CASES = ((16, 64), (8, 256), (4, 1024))
_RANK = 16


def measure(context: Context) -> Iterator[Result]:
    """All tenants in one pass, compared with a pass for each."""
    base = anatomy(llama(context))
    weight = torch.randn(base.intermediate, base.hidden, device=context.device, dtype=torch.bfloat16)
    frozen = _frozen(context, weight / base.hidden**0.5)
    for count, rows in context.choose(_CASES, ((2, 8),)):
        slots = [Slot(number, 0) for number in range(count)]
        adapters = {slot: _adapter(context, base.intermediate, base.hidden) for slot in slots}
        x = torch.randn(count * rows, base.hidden, device=context.device, dtype=torch.bfloat16)
        run = partial(_step, frozen, adapters)
        together = context.seconds(partial(run, slots, x))
        apart = context.seconds(partial(_one_by_one, run, slots, x))
        yield Result(f"gpu tenants {count}x{rows}: together over apart", apart / together, "x")


def _frozen(context: Context, weight: torch.Tensor) -> Frozen:
    """The weight in NF4, unpacked in each pass as in a job; in bfloat16 without bitsandbytes."""
    if context.dry or not has_bitsandbytes():
        return weight
    from bitsandbytes import functional

    codes, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    return partial(functional.dequantize_4bit, codes, state)


def _adapter(context: Context, d_out: int, d_in: int) -> Trainable:
    a, b = (
        torch.randn(*shape, device=context.device, dtype=torch.bfloat16) for shape in ((_RANK, d_in), (d_out, _RANK))
    )
    return Trainable(a.requires_grad_(), b.requires_grad_(), scale=2.0)


def _step(frozen: Frozen, adapters: Mapping[Slot, Trainable], slots: Sequence[Slot], rows: torch.Tensor) -> None:
    x = rows.detach().requires_grad_()
    batch = Batch.of([(slot, len(rows) // len(slots)) for slot in slots])
    y = grouped_lora(x, frozen, {slot: adapters[slot] for slot in slots}, batch)
    torch.autograd.backward(y.sum())


def _one_by_one(run: Callable[[list[Slot], torch.Tensor], None], slots: list[Slot], x: torch.Tensor) -> None:
    for slot, rows in zip(slots, x.chunk(len(slots)), strict=True):
        run([slot], rows)
