"""Decode attention: right in Triton's interpreter, compiled for sm_90 without a GPU, and right on a GPU.

`TRITON_INTERPRET=1 pytest tests/kernels/triton_attention_interpreted.py` runs the interpreted tests one by one.
"""

import importlib
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels can't be compiled", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from loramill_bench.kernels import cuda_attention, on_cuda  # noqa: E402

from .hopper import HOPPER, NAMES, SHARED, empty_cache, spilled  # noqa: E402, F401

host = importlib.import_module("loramill.kernels.triton.attention")

TESTS = Path(__file__).with_name("triton_attention_interpreted.py")
IN_KV_DTYPE = ("qkv", "keys", "values", "out")
TYPES = {"totals": "*fp32", "peaks": "*fp32", "table": "*i32", "blocks": "*i32", "scale": "fp32"}
#: Arguments that Triton knows to be multiples of 16; the blocks follow a table of any length.
MULTIPLES = (*IN_KV_DTYPE, "totals", "peaks", "table", "q_row", "out_row")

#: Head dimension and query heads per KV head: SmolLM2 and Llama 3.2, 80 channels, Llama 3 and Qwen, multi-query, Gemma.
SHAPES = ((64, 3), (80, 8), (128, 4), (128, 20), (256, 8))


#: Bytes of shared memory per multiprocessor, and per program, by compute capability.
MEMORY = {80: (164, 163), 86: (100, 99), 89: (100, 99), 90: (228, 227), 100: (228, 227), 120: (100, 99)}


def compiled(kernel, launch, dtype, target=HOPPER):
    signature = {
        name: "constexpr"
        if name in launch.constants
        else NAMES[dtype]
        if name in IN_KV_DTYPE
        else TYPES.get(name, "i32")
        for name in kernel.arg_names
    }
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(kernel.arg_names.index(name),): value for name, value in launch.constants.items()},
        attrs={(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in MULTIPLES if name in signature},
    )
    return triton.compile(source, target=target, options=dict(launch.options))


def test_the_kernels_are_right_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-5_000:]


@pytest.mark.parametrize(("head_dim", "group"), SHAPES)
@pytest.mark.parametrize("dtype", NAMES, ids=str)
def test_every_configuration_compiles_for_hopper_and_spills_nothing(tmp_path, dtype, head_dim, group):
    attend = host.attend_launch(group, head_dim, 16, dtype.itemsize, MEMORY[90][0] << 10)
    combine = host.combine_launch(group, head_dim, host.SPLITS[-1], attend.constants["KEYS"])
    for kernel, launch in ((host.attend, attend), (host.combine, combine)):
        binary = compiled(kernel, launch, dtype)
        size, usage = spilled(binary, tmp_path)
        assert not size, usage
        assert binary.metadata.shared <= SHARED


@pytest.mark.parametrize("capability", sorted(MEMORY.keys() - {90}))
def test_the_shape_with_most_registers_compiles_for_other_gpus_and_spills_nothing(tmp_path, capability):
    per_multiprocessor, per_program = MEMORY[capability]
    launch = host.attend_launch(20, 128, 16, 2, per_multiprocessor << 10)
    binary = compiled(host.attend, launch, torch.bfloat16, GPUTarget("cuda", capability, 32))
    size, usage = spilled(binary, tmp_path)
    assert not size, usage
    assert binary.metadata.shared <= per_program << 10
    assert per_multiprocessor << 10 >= 2 * (binary.metadata.shared + 1024), "one program per multiprocessor"


@pytest.mark.parametrize(("head_dim", "group"), SHAPES)
def test_keys_and_values_are_read_ahead_by_16_bytes_for_the_matrix_units(head_dim, group):
    launch = host.attend_launch(group, head_dim, 32, 2, MEMORY[90][0] << 10)
    binary = compiled(host.attend, launch, torch.bfloat16)
    text = binary.asm["ptx"]
    assert re.search(r"cp\.async\.cg\.shared\.global \[[^]]*\], \[[^]]*\], 0x10", text)
    assert re.search(r"wgmma|mma\.sync", text)
    loop = binary.asm["ttgir"].partition("scf.for")[2].partition("scf.yield")[0]
    assert loop.count("ttg.async_copy_global_to_local") == 2, "keys and values are not read ahead"


def test_a_kernel_that_spills_is_detected(tmp_path):
    # The options for two-byte numbers.
    launch = replace(host.attend_launch(4, 128, 16, 4, 0), options={"num_warps": 4, "num_stages": 2})
    size, usage = spilled(compiled(host.attend, launch, torch.float32), tmp_path)
    assert size, usage


def test_the_bench_reports_decodes_against_their_floor(monkeypatch):
    case = cuda_attention.Case(127, 512, 32768)
    monkeypatch.setattr(
        cuda_attention, "timing", lambda requested: cuda_attention.Timing(7.0, 5.0, 40.0) if requested == case else None
    )
    results = on_cuda.groups()["cuda attention 127x512+32768"]()
    assert {result.case: (result.value, result.floor) for result in results} == {
        "cuda attention 127x512+32768: decode": (7.0, 5.0),
        "cuda attention 127x512+32768: gather + sdpa": (40.0, 5.0),
    }
    wrong = cuda_attention.Check("attention 3x64", "torch.bfloat16", "called", 0.1, 0.016)
    monkeypatch.setattr(cuda_attention, "check", lambda dtypes: [wrong] if dtypes == [torch.bfloat16] else [])
    (result,) = on_cuda.groups()["cuda attention check bfloat16"]()
    assert (result.value, result.met) == (0.1, False)


@pytest.mark.gpu
def test_the_kernels_are_right_on_this_gpu_called_and_replayed():
    wrong = [check for check in cuda_attention.check() if not check.passed]
    assert not wrong, "\n".join(map(str, wrong))
