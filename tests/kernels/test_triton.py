"""The Triton kernels in Triton's interpreter: in a process of its own, since it is chosen before Triton is imported.

`TRITON_INTERPRET=1 pytest tests/kernels/triton_interpreted.py` runs the same tests one by one.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = [Path(__file__).with_name(name) for name in ("triton_interpreted.py", "triton_quantized_interpreted.py")]
WITHOUT = "import sys; sys.modules['triton'] = None; import loramill.kernels, loramill_bench.kernels.cuda"


def run(*arguments, **variables):
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-5_000:]


def test_the_kernels_keep_the_contract_in_the_interpreter():
    pytest.importorskip("triton")
    run("-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, TESTS), TRITON_INTERPRET="1")


def test_without_triton_everything_else_can_be_imported():
    run("-c", WITHOUT)


@pytest.mark.gpu
def test_the_kernels_are_right_on_this_gpu_called_and_replayed():
    pytest.importorskip("triton")
    from loramill_bench.kernels import cuda

    wrong = [check for check in cuda.check() if not check.passed]
    assert not wrong, "\n".join(map(str, wrong))
