"""The prediction for jobs that share a session against the memory of a process that trains them."""

from __future__ import annotations

import pytest
import torch

from loramill_bench.training.memory import CPU_ERROR, Case
from loramill_bench.training.session_memory import Mix, measure_peak, predict

#: Two steps of three jobs, and of two jobs whose gradients stay between passes.
MIXES = (
    Mix(
        "targets and methods",
        (
            Case("q and v", rank=4, targets=("q_proj", "v_proj"), length=32, batch_size=1, micro_tokens=128),
            Case("all", rank=16, length=32, batch_size=1, micro_tokens=128),
            Case("DoRA", method="dora", rank=8, layers=(20, 21, 22), length=32, batch_size=1, micro_tokens=128),
        ),
    ),
    Mix("accumulating", (Case("a", rank=8, length=32, batch_size=2, micro_tokens=32),) * 2),
)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a process that sees a GPU has its libraries, too")
@pytest.mark.parametrize("mix", MIXES, ids=lambda mix: mix.name)
def test_memory_grows_to_the_predicted_size_of_a_session(mix: Mix) -> None:
    assert predict(mix).bytes == pytest.approx(measure_peak(mix), rel=CPU_ERROR)
