"""Learning rates against transformers' schedules, which spend their first and last step at zero."""

from __future__ import annotations

import pytest
import torch
from transformers import get_scheduler

from loramill.jobs.train.lr_schedule import learning_rate

from .tiny_training import spec_of


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("ratio", [0.0, 0.06, 0.3, 1.0])
@pytest.mark.parametrize("steps", [1, 7, 40])
def test_rates_are_those_of_transformers(schedule: str, ratio: float, steps: int) -> None:
    spec = spec_of(schedule=schedule, warmup_ratio=ratio, steps=steps, learning_rate=0.5)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    theirs = get_scheduler(
        {"constant": "constant_with_warmup"}.get(schedule, schedule),
        optimizer,
        num_warmup_steps=round(ratio * steps) + 1,
        num_training_steps=steps + 1,
    )
    for step in range(steps):
        optimizer.step()
        theirs.step()
        assert learning_rate(spec, step) == pytest.approx(theirs.get_last_lr()[0], rel=1e-9)
        assert learning_rate(spec, step) > 0
