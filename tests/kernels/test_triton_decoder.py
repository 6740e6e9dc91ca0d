"""The decoder's operations other than linears and attention on a GPU: right in Triton's interpreter.

`TRITON_INTERPRET=1 pytest tests/kernels/triton_decoder_interpreted.py` runs the interpreted tests one by one.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

TESTS = [str(Path(__file__).with_name(f"triton_{subject}_interpreted.py")) for subject in ("decoder", "embedding")]


def test_the_kernels_are_right_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-5_000:]


@pytest.mark.gpu
def test_the_kernels_are_right_on_this_gpu_called_and_replayed():
    from loramill_bench.kernels import cuda_decoder

    wrong = [check for check in cuda_decoder.check() if not check.passed]
    assert not wrong, "\n".join(map(str, wrong))
