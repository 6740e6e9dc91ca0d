"""The matrix layouts of the native kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from loramill.kernels.adapters.packing import Layout

#: Number of adjacent outputs: two 512-bit registers of floats.
OUTPUTS = 32
#: Number of adjacent ranks of `a`.
RANKS = 4
#: Number of inputs with adjacent codes.
INPUTS = 4
_WORDS = {2: torch.int16, 4: torch.int32}


def panels(weight: torch.Tensor) -> torch.Tensor:
    """Weight [d_out, d_in] as [ceil(d_out / 32), ceil(d_in / p), 32, p], padded with zeros; p is 1 in float32, else 2.

    The kernels read it from end to end: a step along the inputs reads p inputs of 32 outputs, which are two cache lines
    or, in int8, one.
    """
    return _panels(weight, _lane(weight.dtype), _lane(weight.dtype))


def byte_panels(codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Codes [d_out, d_in] as [ceil(d_out / 32), ceil(d_in / 4), 128], padded with zeros: in the order of `panels`."""
    return _panels(codes, _lane(dtype), INPUTS).view(-1, -(-codes.shape[1] // INPUTS), INPUTS * OUTPUTS)


def nibble_panels(codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Codes [d_out, d_in] below 16 as bytes [ceil(d_out / 32), ceil(d_in / 4), 64].

    The kernels read 64 bytes as 16 numbers of 32 bits: in number l, the n-th four bits from the lowest are code
    16 n + l of 128 in `byte_panels`.
    """
    ordered = byte_panels(codes, dtype)
    nibbles = ordered.view(*ordered.shape[:2], 8, 16).transpose(2, 3)
    return (nibbles[..., 0::2] | nibbles[..., 1::2] << 4).flatten(2)


def rows_of_bytes(packed: torch.Tensor, outputs: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rows [n, d_in padded] of the codes that `byte_panels` packed, for int64 outputs [n]."""
    return packed[outputs[:, None] // OUTPUTS, :, _code_positions(outputs, dtype)].transpose(1, 2).flatten(1)


def rows_of_nibbles(packed: torch.Tensor, outputs: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rows [n, d_in padded] of the codes that `nibble_panels` packed, for int64 outputs [n]."""
    nibble, number = _code_positions(outputs, dtype) // 16, _code_positions(outputs, dtype) % 16
    pairs = packed[outputs[:, None] // OUTPUTS, :, number * 4 + nibble // 2]
    return (pairs >> (nibble % 2 * 4)[..., None] & 15).transpose(1, 2).flatten(1)


def scale_panels(scales: torch.Tensor) -> torch.Tensor:
    """Scales [d_out, groups] as [ceil(d_out / 32), groups, 32], padded with zeros."""
    return _panels(scales, 1, 1)[..., 0]


def quads(a: torch.Tensor) -> torch.Tensor:
    """Matrix a [r, d_in] as [ceil(r / 4), ceil(d_in / n), 4, n], padded with zeros; n is 16 in float32, else 32.

    Read from end to end like `panels`: a step along the inputs reads n of them for each of four ranks.
    """
    line = 16 * _lane(a.dtype)
    padded = F.pad(a, (0, -a.shape[1] % line, 0, -a.shape[0] % RANKS))
    return padded.view(-1, RANKS, padded.shape[1] // line, line).transpose(1, 2).contiguous()


def _code_positions(outputs: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Positions among the 128 codes in `byte_panels` of each output [n] and four inputs, [n, 4]."""
    lane, inputs = _lane(dtype), torch.arange(INPUTS)
    return (inputs // lane * OUTPUTS + outputs[:, None] % OUTPUTS) * lane + inputs % lane


def _panels(matrix: torch.Tensor, lane: int, inputs: int) -> torch.Tensor:
    """The matrix [d_out, d_in] as [ceil(d_out / 32), d_in / lane, 32, lane], d_in padded to a multiple of `inputs`."""
    d_out, d_in = matrix.shape
    padded = F.pad(matrix, (0, -d_in % inputs, 0, -d_out % OUTPUTS)).contiguous()
    if lane == 1:
        return padded.view(-1, OUTPUTS, padded.shape[1], 1).transpose(1, 2).contiguous()
    # A lane moves as one number: torch would copy element by element.
    lanes = padded.view(_WORDS[padded.itemsize * lane])
    moved = lanes.view(-1, OUTPUTS, lanes.shape[1], 1).transpose(1, 2).contiguous()
    return moved.view(matrix.dtype)


def _lane(dtype: torch.dtype) -> int:
    """Number of inputs in a 32-bit lane of the kernels' registers; an adapter's int8 is widened to bfloat16."""
    return 1 if dtype == torch.float32 else 2


PANELS = Layout(a=quads, b=panels)
