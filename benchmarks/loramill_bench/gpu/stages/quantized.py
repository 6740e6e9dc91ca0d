"""The stage quantized: how long a base takes to be quantized, and its linears' time and error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F

from loramill.errors import LoramillError
from loramill.kernels import Quantized, backend
from loramill.kernels.quantization import pack_nf4, quantize
from loramill.sizing.anatomy import anatomy
from loramill_bench.gpu.bases import has_bitsandbytes, llama
from loramill_bench.gpu.stage import Context
from loramill_bench.results import Result

Kind = Literal["nf4", "fp8", "int8"]
#: Rows of x: a decode, a batch of decodes, a prompt.
_ROWS = (1, 32, 2048)


def measure(context: Context) -> Iterator[Result]:
    """The fused gate and up linear of Llama-3-8B, compared with bfloat16."""
    base = anatomy(llama(context))
    torch.manual_seed(0)
    weight = torch.randn(2 * base.intermediate, base.hidden, device=context.device, dtype=torch.bfloat16)
    weight /= base.hidden**0.5
    if has_bitsandbytes():
        seconds = context.seconds(partial(pack_nf4, weight), repeats=3, warm=1)
        whole = sum(linear.weights for linear in base.linears)
        yield Result("gpu quantized nf4: 8B", seconds * whole / weight.numel(), "s")
    else:
        context.note("bitsandbytes is not installed: NF4 is not measured")
    for kind in _kinds(context):
        try:
            yield from _measure_kind(context, weight, kind)
        except LoramillError as refusal:
            context.note(f"{kind} is refused: {refusal.message}")


def _kinds(context: Context) -> list[Kind]:
    """The quantizations that this device serves."""
    float8 = not context.dry and torch.cuda.get_device_capability() >= (8, 9)
    return [*(["nf4"] if has_bitsandbytes() else []), *(["fp8"] if float8 else []), "int8"]  # type: ignore[list-item]


def _measure_kind(context: Context, weight: torch.Tensor, kind: Kind) -> Iterator[Result]:
    ops = backend(context.device)
    rounded = quantize(weight, kind)
    assert isinstance(rounded, Quantized), "the matrix has whole blocks"
    packed, dense = ops.pack_quantized(rounded, torch.bfloat16), ops.pack(weight.clone())
    values = rounded.values(torch.bfloat16).float()
    for rows in context.choose(_ROWS, (1, 8)):
        x = torch.randn(rows, weight.shape[1], device=context.device, dtype=torch.bfloat16)
        run: Callable[..., torch.Tensor] = partial(ops.linear, x)
        case = f"gpu quantized {kind} {rows}"
        us = context.kernel_us(partial(run, packed))
        yield Result(f"{case}: linear", us, "us")
        yield Result(f"{case}: over bfloat16", us / context.kernel_us(partial(run, dense)), "x")
        expected = F.linear(x.float(), values)
        yield Result(
            f"{case}: error", float((run(packed).float() - expected).norm() / expected.norm()), "of the result"
        )
