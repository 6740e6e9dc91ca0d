"""Quantizes base weights to the form that the kernels take."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import nn

from loramill.errors import SetupError
from loramill.kernels.backend import Quantized

#: How a base's linears are stored: unchanged, or in eight or four bits.
Quantization = Literal["none", "int8", "nf4"]
#: How an engine stores them; "fp8" is for engines on GPUs alone, and adapters are trained on the unchanged base.
ServedQuantization = Literal["none", "int8", "nf4", "fp8"]

#: Inputs that share a scale in NF4, as QLoRA trains.
_BLOCK = 64
#: The largest number of float8_e4m3fn, and the smallest magnitude that a scale is computed from: a row of zeros has no
#: scale of its own.
FP8_LARGEST, FP8_SMALLEST = 448.0, 1e-12


@dataclass(frozen=True, slots=True)
class PackedNf4:
    """A weight [d_out, d_in] as bitsandbytes packs it.

    Attributes:
        codes: uint8 [d_out * d_in / 2, 1]: two weights per byte, the first in the upper four bits.
        state: bitsandbytes' QuantState: the doubly quantized scales of blocks of 64 weights, and the shape.
    """

    codes: torch.Tensor
    state: Any

    def tensors(self) -> dict[str, torch.Tensor]:
        """The weight as named tensors, with the names of quantized checkpoints on the hub."""
        return {"weight": self.codes, **self.state.as_dict(packed=True)}

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> PackedNf4:
        """The inverse of `tensors`, on their device.

        Raises:
            SetupError: bitsandbytes isn't installed.
        """
        others, codes = dict(tensors), tensors["weight"]
        del others["weight"]
        return cls(codes, _bitsandbytes().QuantState.from_dict(others, codes.device))


#: Returns a module's weight in NF4, given its name and a function that reads the weight.
Nf4Source = Callable[[str, Callable[[], torch.Tensor]], PackedNf4]


def quantize(weight: torch.Tensor, kind: Literal["int8", "nf4", "fp8"]) -> Quantized | torch.Tensor:
    """Quantizes a linear's weight [d_out, d_in], of any floating dtype, on its device.

    "int8" stores each output's weights as multiples of a 127th of the largest. "fp8" stores them in float8_e4m3fn,
    scaled so that the largest is 448. "nf4" is bitsandbytes' quantization of the weight in bfloat16, with doubly
    quantized scales (Dettmers et al. 2023, QLoRA, sections 3 and 4), bit for bit: an adapter that was trained on a
    `Linear4bit` runs on exactly the base that it was trained on.

    The modules of a fused linear are quantized one by one and joined by `concatenate`, since the scales of NF4 depend
    on the whole module.

    Returns:
        The codes; or the rounded values, float32 [d_out, d_in], if bitsandbytes' blocks of 64 weights cross rows: in
        NF4, if d_in is not a multiple of 64. All modules of a fused linear return the same of the two.

    Raises:
        SetupError: NF4 was requested, and bitsandbytes isn't installed.
    """
    if kind == "nf4":
        return unpack_nf4(pack_nf4(weight))
    wide = weight.float()
    largest = wide.abs().amax(dim=1, keepdim=True)
    if kind == "fp8":
        scales = largest.clamp(min=FP8_SMALLEST) / FP8_LARGEST
        codes = (wide / scales).clamp(-FP8_LARGEST, FP8_LARGEST).to(torch.float8_e4m3fn)
        return Quantized(codes, None, scales)
    scales = largest / 127
    # The scale of a row of zeros is 0, and that of a row with a NaN is NaN.
    codes = (wide / scales).nan_to_num(0.0).round().clamp(-127, 127).to(torch.int8)
    return Quantized(codes, None, scales)


def dequantize(rounded: Quantized | torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The values [d_out, d_in] of what `quantize` returned."""
    return rounded.values(dtype) if isinstance(rounded, Quantized) else rounded.to(dtype)


def pack_nf4(weight: torch.Tensor) -> PackedNf4:
    """Quantizes a weight [d_out, d_in] to NF4 by bitsandbytes' own quantizer, on the weight's device.

    A GPU takes a second or two for a base of 8B; a CPU quantizes about 27 million weights per second and thread.

    The quantizers for CPUs and GPUs follow one rule, but differ in the last bit of 1 / largest: a weight exactly
    between two codes may get either one. Processes that must have the same codes therefore share them
    (`loramill.models.nf4_cache`).

    Raises:
        SetupError: bitsandbytes isn't installed.
    """
    codes, state = _bitsandbytes().quantize_4bit(
        weight.to(torch.bfloat16), blocksize=_BLOCK, compress_statistics=True, quant_type="nf4"
    )
    return PackedNf4(codes, state)


def nf4_without_cache(_name: str, weight: Callable[[], torch.Tensor]) -> PackedNf4:
    """The `Nf4Source` that quantizes at each call."""
    return pack_nf4(weight())


def unpack_nf4(packed: PackedNf4) -> Quantized | torch.Tensor:
    """The codes and scales of a weight in NF4, or its values; see `quantize`."""
    functional, state = _bitsandbytes(), packed.state
    d_out, d_in = state.shape
    scales = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    if d_in % _BLOCK:
        shape = [d_out, d_in]
        values: torch.Tensor = torch.ops.bitsandbytes.dequantize_4bit(
            packed.codes, scales, _BLOCK, "nf4", shape, torch.float32
        )
        return values
    # The first of a byte's two weights is in its upper four bits.
    codes = torch.stack([packed.codes >> 4, packed.codes & 15], dim=-1).view(d_out, d_in)
    return Quantized(codes, state.code, scales.view(d_out, -1))


def nf4_linear(linear: nn.Linear, packed: PackedNf4) -> nn.Linear:
    """A linear as bitsandbytes' Linear4bit with the given weight; it computes in the linear's dtype.

    Raises:
        SetupError: bitsandbytes isn't installed.
    """
    _bitsandbytes()
    from bitsandbytes.nn import Linear4bit, Params4bit

    state = packed.state
    dtype = state.dtype = linear.weight.dtype
    built = Linear4bit(
        linear.in_features, linear.out_features, linear.bias is not None, dtype, quant_type="nf4", device="meta"
    )
    built.weight = Params4bit(
        packed.codes, requires_grad=False, quant_state=state, quant_type="nf4", module=built, bnb_quantized=True
    )
    built.bias, built.quant_state = linear.bias, state
    return cast(nn.Linear, built)


def concatenate(parts: Sequence[Quantized]) -> Quantized:
    """Joins the rows of matrices of one kind and d_in; at least one."""
    codes, scales = [part.codes for part in parts], torch.cat([part.scales for part in parts])
    if any(part.dtype == torch.float8_e4m3fn for part in codes):
        # As bytes, since not every operation on a GPU takes float8.
        return Quantized(torch.cat([part.view(torch.uint8) for part in codes]).view(codes[0].dtype), None, scales)
    return Quantized(torch.cat(codes), parts[0].levels, scales)


def _bitsandbytes() -> Any:
    """bitsandbytes.functional."""
    try:
        from bitsandbytes import functional
    except ImportError as error:
        raise SetupError("A base in NF4 needs bitsandbytes; pip install bitsandbytes, or serve it in int8.") from error
    return functional
