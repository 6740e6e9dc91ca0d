"""Decode attention: right in Triton's interpreter, reading ahead where it is compiled, and right on a GPU.

`TRITON_INTERPRET=1 pytest tests/kernels/triton_attention_interpreted.py` runs the interpreted tests one by one.
"""

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

from loramill_bench.kernels import cuda_attention, on_cuda  # noqa: E402

from .compiling import GPUS, compiled, empty_cache  # noqa: E402, F401
from .shipped import HEADS, attend_configuration  # noqa: E402

TESTS = Path(__file__).with_name("triton_attention_interpreted.py")


def test_the_kernels_are_right_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-5_000:]


@pytest.mark.parametrize("gpu", GPUS.values(), ids=lambda gpu: f"sm_{gpu.capability}")
def test_two_programs_share_a_multiprocessor(gpu):
    binary = compiled(attend_configuration(gpu, torch.bfloat16, 128, 20), gpu)
    # A program has 1 KiB of its own.
    assert 2 * (binary.shared + 1024) <= gpu.per_multiprocessor << 10


@pytest.mark.parametrize(("head_dim", "group"), HEADS)
def test_keys_and_values_are_read_ahead_by_16_bytes_for_the_matrix_units(head_dim, group):
    binary = compiled(attend_configuration(GPUS[90], torch.bfloat16, head_dim, group, block_size=32))
    text = binary.texts["ptx"]
    assert re.search(r"cp\.async\.cg\.shared\.global \[[^]]*\], \[[^]]*\], 0x10", text)
    assert re.search(r"wgmma|mma\.sync", text)
    loop = binary.texts["ttgir"].partition("scf.for")[2].partition("scf.yield")[0]
    assert loop.count("ttg.async_copy_global_to_local") == 2, "keys and values are not read ahead"


def test_a_kernel_that_spills_is_detected():
    shipped = attend_configuration(GPUS[90], torch.float32, 128, 4)
    with_options_of_two_bytes = replace(shipped, options={"num_warps": 4, "num_stages": 2})
    binary = compiled(with_options_of_two_bytes)
    assert binary.spilled, binary


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
