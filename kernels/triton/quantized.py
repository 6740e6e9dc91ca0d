"""Products with a base's weights on a GPU; quantized ones stay quantized in memory.

A step reads 0.56 bytes per weight in NF4, and 1 in int8 and float8; dequantizing a whole matrix at each call would move
24.6 and 21. Everything is launched on the current stream without synchronization, and can be captured into a graph.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton

from loramill.errors import EngineFault, SetupError
from loramill.kernels import torch_backend
from loramill.kernels.backend import Codebook, Quantized, Weight
from loramill.kernels.triton import quantized_kernels
from loramill.kernels.triton.plans import Launch

#: Maximum number of rows for our int8 kernel; for more, writing the dequantized matrix once (3 bytes per weight) and
#: multiplying by cuBLAS takes less time.
INT8_ROWS = 256
#: The rounding of rows to float8; a program loads 4,096 elements of its row at once.
FP8_LAUNCH = Launch("quantize_rows", {"DEPTH": 4096}, {"num_warps": 8})


def pack_quantized(matrix: Quantized, dtype: torch.dtype) -> Weight:
    """Keeps the codes: those of NF4 two per byte, as bitsandbytes packs them.

    A matrix whose shape no quantized product supports is stored as its values in `dtype`.

    Raises:
        EngineFault: The levels are not NF4's.
        SetupError: It is NF4, and bitsandbytes isn't installed.
    """
    if not _fits(matrix):
        return torch_backend.pack(matrix.values(dtype))
    codes, levels = matrix.codes, matrix.levels
    if levels is not None:
        _check_levels(levels)
        codes = codes[:, 0::2] << 4 | codes[:, 1::2]
    codebook = Codebook(levels, matrix.scales.contiguous(), matrix.group)
    return Weight(codes.contiguous(), dtype, *matrix.codes.shape, codebook=codebook)


def embed(tokens: torch.Tensor, weight: Weight) -> torch.Tensor:
    """The tokens' rows of the matrix, [rows, d_in]."""
    codebook = weight.codebook
    if codebook is None:
        return F.embedding(tokens, weight.data)
    # As bytes, since not every operation on a GPU takes float8.
    codes, scales = weight.data.view(torch.uint8)[tokens], codebook.scales[tokens]
    if codebook.levels is None:
        return (codes.view(weight.data.dtype).float() * scales).to(weight.dtype)
    shape = [len(tokens), weight.d_in]
    rows: torch.Tensor = torch.ops.bitsandbytes.dequantize_4bit(
        codes, scales, codebook.group, "nf4", shape, weight.dtype
    )
    return rows


def linear(x: torch.Tensor, weight: Weight) -> torch.Tensor:
    """`x @ weight.T`, [rows, d_out]."""
    codebook = weight.codebook
    if codebook is None:
        return F.linear(x, weight.data)
    if codebook.levels is not None:
        return _nf4_linear(x, weight, codebook)
    if weight.data.dtype == torch.int8:
        return _int8_linear(x, weight, codebook)
    return _fp8_linear(x, weight, codebook)


def _fits(matrix: Quantized) -> bool:
    """Whether there is a product for these codes and this shape."""
    d_out, d_in = matrix.codes.shape
    if matrix.levels is not None:
        # bitsandbytes 0.50 (csrc/gemm_4bit*.cu) reads 32 inputs at a time with one scale, writes two outputs at a time,
        # and counts weights in 32 bits; it takes blocks of these sizes.
        return matrix.group in (32, 64, 128, 256, 512, 1024, 2048, 4096) and d_out % 2 == 0 and d_out * d_in < 2**31
    if matrix.codes.dtype == torch.int8:
        return matrix.scales.shape[1] == 1
    return matrix.scales.shape[1] == 1 and d_out % 16 == 0 and d_in % 16 == 0


def _check_levels(levels: torch.Tensor) -> None:
    """Checks whether levels are those that bitsandbytes' kernels contain."""
    try:
        from bitsandbytes.functional import get_4bit_type
    except ImportError as error:
        raise SetupError("A base in NF4 needs bitsandbytes; pip install bitsandbytes, or serve it in fp8.") from error
    if not torch.equal(levels, get_4bit_type("nf4", device=levels.device)):
        raise EngineFault("The levels of a matrix in four bits are not those of NF4, which the GPU's kernels contain.")


def _nf4_linear(x: torch.Tensor, weight: Weight, codebook: Codebook) -> torch.Tensor:
    """Calls bitsandbytes' product.

    Few rows are multiplied by kernels of bitsandbytes; those for up to three rows round levels and scales to x's dtype
    (an error of 2^-8 of a weight in bfloat16). For more rows, bitsandbytes dequantizes as in training and calls cuBLAS,
    which moves 4.6 bytes per weight. The limit depends on the GPU and the shape.
    """
    shape = [weight.d_out, weight.d_in]
    y: torch.Tensor = torch.ops.bitsandbytes.gemm_4bit(x, weight.data, shape, codebook.scales, codebook.group, "nf4")
    return y


def _int8_linear(x: torch.Tensor, weight: Weight, codebook: Codebook) -> torch.Tensor:
    rows = len(x)
    if rows > INT8_ROWS:
        values = torch.empty(weight.data.shape, dtype=x.dtype, device=x.device)
        return F.linear(x, torch.mul(weight.data, codebook.scales, out=values))
    y = torch.empty(rows, weight.d_out, dtype=x.dtype, device=x.device)
    launch = int8_launch(rows, x.element_size())
    # Tiles of rows are adjacent in the grid, so that they read the same codes at the same time.
    grid = (triton.cdiv(rows, launch.constants["ROWS"]), triton.cdiv(weight.d_out, launch.constants["COLUMNS"]))
    quantized_kernels.int8_linear[grid](
        x, weight.data, codebook.scales, y, rows, weight.d_in, weight.d_out, x.stride(0),
        **launch.constants, **launch.options,
    )  # fmt: skip
    return y


def int8_launch(rows: int, itemsize: int) -> Launch:
    """The product for a number of rows of x, with elements of this size.

    One tile of rows up to 64; narrow columns for up to 16 rows, so that a matrix of 4,096 outputs has 128 programs.
    """
    tile, columns, depth = (16, 32, 512) if rows <= 16 else (32 if rows <= 32 else 64, 64, 256)
    constants = {"ROWS": tile, "COLUMNS": columns, "DEPTH": depth // itemsize}
    return Launch("int8_linear", constants, {"num_warps": 4, "num_stages": 3})


def _fp8_linear(x: torch.Tensor, weight: Weight, codebook: Codebook) -> torch.Tensor:
    """Rounds x to float8 with a scale per row, and multiplies in float8 with sums in float32."""
    codes = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(len(x), 1, dtype=torch.float32, device=x.device)
    # One launch; torch would need six, about 10 us per linear of a decode step in a graph.
    quantized_kernels.quantize_rows[len(x),](
        x, codes, scales, weight.d_in, x.stride(0), **FP8_LAUNCH.constants, **FP8_LAUNCH.options
    )
    # Fast accumulation, as in other engines, is exact far beyond the rounding to float8.
    y: torch.Tensor = torch._scaled_mm(
        codes, weight.data.T, scales, codebook.scales.T, out_dtype=x.dtype, use_fast_accum=True
    )
    return y
