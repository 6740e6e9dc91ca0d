"""Quantizes base weights to the form that the kernels take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import nn

from loramill.errors import SetupError
from loramill.kernels.backend import Quantized

#: How a base's linears are stored: unchanged, or in eight or four bits.
Quantization = Literal["none", "int8", "nf4"]

#: Inputs that share a scale in NF4, as QLoRA trains.
_BLOCK = 64


def quantize(weight: torch.Tensor, kind: Literal["int8", "nf4"]) -> Quantized | torch.Tensor:
    """Quantizes a linear's weight [d_out, d_in], of any floating dtype.

    "int8" stores each output's weights as multiples of a 127th of the largest. "nf4" is bitsandbytes' quantization of
    the weight in bfloat16, with doubly quantized scales (Dettmers et al. 2023, QLoRA, sections 3 and 4), bit for bit:
    an adapter that was trained on a `Linear4bit` runs on exactly the base that it was trained on.

    The modules of a fused linear are quantized one by one and joined by `concatenate`, since the scales of NF4 depend
    on the whole module.

    Returns:
        The codes; or the rounded values, float32 [d_out, d_in], if bitsandbytes' blocks of 64 weights cross rows: in
        NF4, if d_in is not a multiple of 64. All modules of a fused linear return the same of the two.

    Raises:
        SetupError: NF4 was requested, and bitsandbytes isn't installed.
    """
    if kind == "nf4":
        return _nf4(weight.to(torch.bfloat16))
    wide = weight.float()
    scales = wide.abs().amax(dim=1, keepdim=True) / 127
    # The scale of a row of zeros is 0, and that of a row with a NaN is NaN.
    codes = (wide / scales).nan_to_num(0.0).round().clamp(-127, 127).to(torch.int8)
    return Quantized(codes, None, scales)


def fake_quantize(weight: torch.Tensor, kind: Literal["int8", "nf4"]) -> torch.Tensor:
    """A weight after quantization and dequantization: the values [d_out, d_in], in its own dtype."""
    codes = quantize(weight, kind)
    return codes.values(weight.dtype) if isinstance(codes, Quantized) else codes.to(weight.dtype)


def nf4_linear(linear: nn.Linear) -> nn.Linear:
    """A linear as bitsandbytes' Linear4bit with exactly the codes of `quantize`; it computes in the linear's dtype.

    Raises:
        SetupError: bitsandbytes isn't installed.
    """
    data, state = _bitsandbytes(linear.weight.data.to(torch.bfloat16))
    from bitsandbytes.nn import Linear4bit, Params4bit

    dtype = state.dtype = linear.weight.dtype
    packed = Linear4bit(
        linear.in_features, linear.out_features, linear.bias is not None, dtype, quant_type="nf4", device="meta"
    )
    packed.weight = Params4bit(
        data, requires_grad=False, quant_state=state, quant_type="nf4", module=packed, bnb_quantized=True
    )
    packed.bias, packed.quant_state = linear.bias, state
    return cast(nn.Linear, packed)


def concatenate(parts: Sequence[Quantized]) -> Quantized:
    """Joins the rows of matrices of one kind and d_in; at least one."""
    codes, scales = (torch.cat([getattr(part, name) for part in parts]) for name in ("codes", "scales"))
    return Quantized(codes, parts[0].levels, scales)


def _nf4(weight: torch.Tensor) -> Quantized | torch.Tensor:
    packed, state = _bitsandbytes(weight)
    from bitsandbytes import functional

    if weight.shape[1] % _BLOCK:
        state.dtype = torch.float32
        values: torch.Tensor = functional.dequantize_4bit(packed, state)
        return values
    # The first of a byte's two weights is in its upper four bits.
    codes = torch.stack([packed >> 4, packed & 15], dim=-1).view(weight.shape)
    scales = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    return Quantized(codes, state.code, scales.view(len(weight), -1))


def _bitsandbytes(weight: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """The packed codes of a bfloat16 weight, and bitsandbytes' QuantState with their scales."""
    try:
        from bitsandbytes import functional
    except ImportError as error:
        raise SetupError("A base in NF4 needs bitsandbytes; pip install bitsandbytes, or serve it in int8.") from error
    packed, state = functional.quantize_4bit(weight, blocksize=_BLOCK, compress_statistics=True, quant_type="nf4")
    return packed, state
