"""The kernels for quantized weights compile without spilling for each generation of GPUs that has them."""

import os
import re

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels can't be compiled", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from loramill.gpus import FP8_CAPABILITY, MIN_CAPABILITY  # noqa: E402
from loramill.kernels.triton import quantized, quantized_kernels  # noqa: E402

from .hopper import NAMES, empty_cache, spilled  # noqa: E402, F401

#: Bytes of shared memory that a program can have on the GPUs with the least, those of 8.6, 8.9 and 12.0.
SHARED = 99 << 10
TYPES = {"scales": "*fp32", "rows": "i32", "d_in": "i32", "d_out": "i32", "x_row": "i32"}


def compiled(kernel, capability, types, **options):
    """A kernel for rows and columns whose numbers are multiples of 16."""
    constants = {name: value for name, value in options.items() if name.isupper()}
    source = ASTSource(
        fn=kernel,
        signature={name: "constexpr" if name in constants else {**TYPES, **types}[name] for name in kernel.arg_names},
        constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
        attrs={
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(kernel.arg_names)
            if name not in ("rows", *constants)
        },
    )
    target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
    rest = {name: value for name, value in options.items() if name not in constants}
    return triton.compile(source, target=target, options=rest)


@pytest.mark.parametrize("capability", [MIN_CAPABILITY, (9, 0)], ids=str)
@pytest.mark.parametrize("rows", [1, 32, 256])
def test_int8_products_use_the_matrix_units(tmp_path, rows, capability):
    name = NAMES[torch.bfloat16]
    plan = quantized.int8_plan(rows, 2)
    binary = compiled(quantized_kernels.int8_linear, capability, {"x": name, "y": name, "codes": "*i8"}, **plan)
    size, usage = spilled(binary, tmp_path)
    assert not size and binary.metadata.shared <= SHARED, f"{binary.metadata.shared} bytes of shared memory, {usage}"
    assert ("wgmma" if capability >= (9, 0) and rows > 16 else "mma.sync") in binary.asm["ptx"]


def test_every_number_of_rows_has_one_of_these_plans():
    plans = [quantized.int8_plan(rows, 2) for rows in range(1, quantized.INT8_ROWS + 1)]
    assert all(plan in [quantized.int8_plan(rows, 2) for rows in (1, 32, 256)] for plan in plans)


@pytest.mark.parametrize("capability", [FP8_CAPABILITY, (9, 0), (12, 0)], ids=str)
def test_rows_are_rounded_to_float8_by_the_hardware(tmp_path, capability):
    types = {"x": NAMES[torch.bfloat16], "codes": "*fp8e4nv"}
    options = {"DEPTH": quantized.FP8_DEPTH, "num_warps": 8}
    binary = compiled(quantized_kernels.quantize_rows, capability, types, **options)
    size, usage = spilled(binary, tmp_path)
    assert not size, usage
    # On 8.9, by way of float16, in which all these numbers are normal.
    assert re.search(r"cvt\.rn\.satfinite\.e4m3x2\.f(32|16x2)", binary.asm["ptx"])
