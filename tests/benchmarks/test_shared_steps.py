"""The benchmark of shared steps, on a small base."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from loramill.data.encoding import EncodedExample
from loramill.models.catalog import Base
from loramill_bench.training import shared_steps
from loramill_bench.training.shared_steps import Case


def test_shared_and_separate_steps_are_compared(tiny_base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    def examples(lengths: Sequence[int]) -> list[EncodedExample]:
        return [EncodedExample(tuple(range(length)), length - 4) for length in lengths]

    monkeypatch.setattr(shared_steps, "random_examples", examples)
    threads = torch.get_num_threads()
    case = Case("shared", "nf4", ((4, 1, 8), (8, 2, 16)), 1.0)
    try:
        ratio, speed = shared_steps.measure(tiny_base, case, 1)
    finally:
        torch.set_num_threads(threads)
    assert ratio.case == "shared: separate steps over a shared one" and ratio.value > 0 and ratio.target == 1.0
    assert speed.unit == "tokens/s" and speed.value > 0
