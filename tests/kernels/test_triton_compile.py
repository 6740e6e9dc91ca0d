"""What ships compiles for every kind of GPU that is supported, where there is none, and spills nothing.

All configurations are compiled for sm_90 in bfloat16 and float32. In float16, and for the other GPUs, those of each
kernel are compiled that need most registers and most shared memory on sm_90: 85 seconds of CPU time.
"""

import importlib
import os
import re
from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels can't be compiled", allow_module_level=True)

from loramill.kernels.triton import plans  # noqa: E402

from .compiling import GPUS, Binary, Configuration, GpuKind, compiled, empty_cache  # noqa: E402, F401
from .shipped import SHIPPED, lora_configuration, lora_launches, quantized_host  # noqa: E402

HOPPER = GPUS[90]
ROOT = Path(__file__).parents[2]


#: Families without matrix units: their code is the same for the GPUs between the oldest and the newest, and, except for
#: conversions, for float16 as for bfloat16.
ELEMENTWISE = ("decoder", "training")
#: Of which all configurations are compiled. The code for float16 is bfloat16's but for conversions and the kind of the
#: products of the matrix units.
DTYPES = (torch.bfloat16, torch.float32)

Compiled = list[tuple[Configuration, Binary]]


def others(family: str) -> list[int]:
    return [80, 120] if family in ELEMENTWISE else sorted(GPUS.keys() - {90})


@cache
def grid(family: str, dtype: torch.dtype) -> Compiled:
    """All configurations of a family and dtype for sm_90, compiled once for all tests."""
    return [(each, compiled(each, HOPPER)) for each in SHIPPED[family](HOPPER, dtype)]


def largest(family: str) -> Iterator[tuple[torch.dtype, int]]:
    """Of each kernel of a family, the configurations that take most registers and most shared memory on sm_90."""
    most: dict[tuple[str, str], tuple[int, torch.dtype, int]] = {}
    for dtype in DTYPES:
        for index, (each, binary) in enumerate(grid(family, dtype)):
            for kind, amount in (("registers", binary.registers), ("shared", binary.shared)):
                key = (each.kernel.__name__, kind)
                if amount > most.get(key, (-1,))[0]:
                    most[key] = amount, dtype, index
    yield from {(dtype, index): None for _, dtype, index in most.values()}


def extremes(family: str, gpu: GpuKind, of: torch.dtype | None = None) -> Iterator[Configuration]:
    """The largest configurations of a family for a GPU, in the dtype that they are the largest in, or in another."""
    for dtype, index in largest(family):
        # Some launches depend on the GPU, and some GPUs lack the last ones.
        yield from list(SHIPPED[family](gpu, of or dtype))[index : index + 1]


def faults(pairs: Compiled, gpu: GpuKind) -> str:
    return "\n".join(
        f"{each.name}: {binary}" for each, binary in pairs if binary.spilled or binary.shared > gpu.per_program << 10
    )


def test_every_step_has_a_plan_and_every_plan_is_compiled():
    chosen = {plans.choose(rows, rank) for rows, rank in product((0, 1, 2, 7, 33, 5000), range(257))}
    static = {plans.choose_static(rows, rank) for rows, rank in product((1, 32, 33, 512), (1, 16, 17, 256))}
    assert chosen == {plan for _, _, plan in plans.TABLE}
    assert static <= chosen


def test_every_kernel_is_among_the_shipped():
    sources = [path for folder in ("kernels", "jobs") for path in ROOT.joinpath(folder).rglob("*.py")]
    names = [
        ".".join(("loramill", *path.relative_to(ROOT).with_suffix("").parts))
        for path in sources
        if "@triton.jit" in path.read_text(encoding="utf-8")
    ]
    members = [member for name in names for member in vars(importlib.import_module(name)).values()]
    kernels = {member.__name__ for member in members if isinstance(member, triton.JITFunction)}
    shipped = {each.kernel.__name__ for family in SHIPPED.values() for each in family(HOPPER, torch.bfloat16)}
    assert {name for name in kernels if not name.startswith("_")} == shipped


@pytest.mark.parametrize(("family", "dtype"), [*product(SHIPPED, DTYPES)], ids=str)
def test_every_configuration_compiles_for_hopper_and_spills_nothing(family, dtype):
    assert not faults(grid(family, dtype), HOPPER)


@pytest.mark.parametrize("family", [each for each in SHIPPED if each not in ELEMENTWISE])
def test_the_largest_configurations_compile_for_hopper_in_float16_and_spill_nothing(family):
    assert not faults([(each, compiled(each, HOPPER)) for each in extremes(family, HOPPER, torch.float16)], HOPPER)


@pytest.mark.parametrize(
    ("family", "capability"), [(each, other) for each in SHIPPED for other in others(each)], ids=str
)
def test_the_largest_configurations_compile_for_other_gpus_and_spill_nothing(family, capability):
    gpu = GPUS[capability]
    assert not faults([(each, compiled(each, gpu)) for each in extremes(family, gpu)], gpu)


@pytest.mark.parametrize("launch", [*lora_launches(2)], ids=lambda launch: f"{launch.kernel}-{launch.constants}")
def test_weights_of_even_dimensions_are_read_16_bytes_at_a_time(launch):
    text = compiled(lora_configuration(launch, torch.bfloat16)).texts["ptx"]
    assert re.search(r"ld\.global\.v4\.b32|cp\.async\.cg\.shared\.global \[[^]]*\], \[[^]]*\], 0x10", text), launch


@pytest.mark.parametrize("plan", [plan for _, _, plan in plans.TABLE if plan.rows > 1])
def test_tiles_of_many_rows_use_the_matrix_units(plan):
    for launch in (plans.shrink(plan, 2, 4), plans.expand(plan)):
        text = compiled(lora_configuration(launch, torch.bfloat16)).texts["ptx"]
        assert re.search(r"wgmma|mma\.sync", text), launch


def test_a_kernel_that_spills_is_detected():
    constants = {"SPLITS": 8, "RANKS": 16, "WIDTH": 256, "ROWS": 64}
    huge = plans.Launch("expand_rows", constants, {"num_warps": 4, "num_stages": 1})
    binary = compiled(lora_configuration(huge, torch.bfloat16))
    assert binary.spilled, binary


@pytest.mark.parametrize("rows", [1, 32, 256])
def test_int8_products_use_the_matrix_units(rows):
    launch = quantized_host.int8_launch(rows, 2)
    each, binary = next(pair for pair in grid("quantized", torch.bfloat16) if pair[0].constants == launch.constants)
    assert ("wgmma" if rows > 16 else "mma.sync") in binary.texts["ptx"], each.name


def test_every_number_of_rows_in_int8_is_compiled():
    launches = [quantized_host.int8_launch(rows, 2).constants for rows in range(1, quantized_host.INT8_ROWS + 1)]
    compiled = [each.constants for each, _ in grid("quantized", torch.bfloat16)]
    assert all(constants in compiled for constants in launches)


@pytest.mark.parametrize("capability", [89, 90], ids=str)
def test_rows_are_rounded_to_float8_by_the_hardware(capability):
    rounding = list(SHIPPED["quantized"](GPUS[capability], torch.bfloat16))[-1]
    # On 8.9, by way of float16, in which all these numbers are normal.
    assert re.search(r"cvt\.rn\.satfinite\.e4m3x2\.f(32|16x2)", compiled(rounding, GPUS[capability]).texts["ptx"])
