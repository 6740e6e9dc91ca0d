"""Every configuration that ships compiles for sm_90, without a GPU, and spills nothing."""

import os
import re
from itertools import product

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels can't be compiled", allow_module_level=True)

from triton.compiler import ASTSource  # noqa: E402

from loramill.kernels.memory import ALIGNMENT  # noqa: E402
from loramill.kernels.triton import kernels, plans  # noqa: E402

from .hopper import HOPPER, NAMES, SHARED, empty_cache, spilled  # noqa: E402, F401

POINTERS = {"gains": "*fp32", "h": "*fp32", "table": "*i64", "starts": "*i32", "tiles": "*i32"}
IN_SLAB_DTYPE = ("x", "y", "weights")
#: Widths, and distances between rows, that Triton knows to be multiples of 16 where they are.
DIMENSIONS = ("d_in", "x_row", "y_row")


def launches(itemsize):
    """Each kernel of each plan: a sum in one step, in several, and in as many as the widest MLP of Llama 3 takes."""
    for _, _, plan in plans.TABLE:
        for steps in (1, 4, 64):
            yield plans.shrink(plan, itemsize, steps)
        yield plans.expand(plan)
    for d_in in (100, plans.FUSED.d_in):
        yield plans.fused(d_in, itemsize)


def compiled(launch, dtype, aligned):
    """A kernel as `lora` compiles it at a q/k/v site whose dimensions are multiples of 16, or odd."""
    kernel = getattr(kernels, launch.kernel)
    site = {"MODULES": 3, "STRIDE": 3, "ALIGN": ALIGNMENT // dtype.itemsize, "ALIGN_Y": 16 if aligned else 1}
    constants = {name: value for name, value in {**site, **launch.constants}.items() if name in kernel.arg_names}
    signature = {
        name: "constexpr" if name in constants else NAMES[dtype] if name in IN_SLAB_DTYPE else POINTERS.get(name, "i32")
        for name in kernel.arg_names
    }
    multiples = [
        i
        for i, name in enumerate(kernel.arg_names)
        if name == "h_row" or name in POINTERS or name == "weights" or (aligned and name in (*DIMENSIONS, "x", "y"))
    ]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in multiples},
    )
    return triton.compile(source, target=HOPPER, options=dict(launch.options))


def test_every_step_has_a_plan_and_every_plan_is_compiled():
    chosen = {plans.choose(rows, rank) for rows, rank in product((0, 1, 2, 7, 33, 5000), range(257))}
    static = {plans.choose_static(rows, rank) for rows, rank in product((1, 32, 33, 512), (1, 16, 17, 256))}
    assert chosen == {plan for _, _, plan in plans.TABLE}
    assert static <= chosen


# Odd float16 is left out: a load depends on the size of an element, and float16's is bfloat16's.
@pytest.mark.parametrize(
    ("dtype", "aligned"),
    [*((dtype, True) for dtype in NAMES), (torch.float32, False), (torch.bfloat16, False)],
    ids=str,
)
def test_every_configuration_compiles_for_hopper_and_spills_nothing(tmp_path, dtype, aligned):
    faults = []
    for launch in launches(dtype.itemsize):
        binary = compiled(launch, dtype, aligned)
        size, usage = spilled(binary, tmp_path)
        if size or binary.metadata.shared > SHARED:
            faults.append(f"{launch}: {binary.metadata.shared} bytes of shared memory, {usage}")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("launch", [*launches(2)], ids=lambda launch: f"{launch.kernel}-{launch.constants}")
def test_weights_of_even_dimensions_are_read_16_bytes_at_a_time(launch):
    text = compiled(launch, torch.bfloat16, True).asm["ptx"]
    assert re.search(r"ld\.global\.v4\.b32|cp\.async\.cg\.shared\.global \[[^]]*\], \[[^]]*\], 0x10", text), launch


@pytest.mark.parametrize("plan", [plan for _, _, plan in plans.TABLE if plan.rows > 1])
def test_tiles_of_many_rows_use_the_matrix_units(plan):
    for launch in (plans.shrink(plan, 2, 4), plans.expand(plan)):
        assert re.search(r"wgmma|mma\.sync", compiled(launch, torch.bfloat16, True).asm["ptx"]), launch


def test_a_kernel_that_spills_is_detected(tmp_path):
    constants = {"SPLITS": 8, "RANKS": 64, "WIDTH": 256, "ROWS": 128}
    huge = plans.Launch("expand_rows", constants, {"num_warps": 4, "num_stages": 1})
    size, usage = spilled(compiled(huge, torch.bfloat16, True), tmp_path)
    assert size, usage
