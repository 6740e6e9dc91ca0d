"""`loramill-bench sweep`, on a small base and small files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from loramill.errors import InvalidRequest
from loramill_bench.training import sweep

from ..jobs.conftest import base_of, tiny_chat_base
from ..jobs.environment import rows

__all__ = ["tiny_chat_base"]


@pytest.fixture(autouse=True)
def small_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "TENANTS", ("first", "second"))
    monkeypatch.setattr(sweep, "SWEEP", {"learning_rate": [1e-5, 1e-2], "rank": [2, 4]})


def test_a_sweep_is_compared_with_whole_trainings(tiny_chat_base: Path, tmp_path: Path) -> None:
    for tenant in sweep.TENANTS:
        (tmp_path / tenant).mkdir()
        for name in ("train", "valid"):
            (tmp_path / tenant / f"{name}.jsonl").write_bytes(rows())
    groups: list[str] = []
    threads = torch.get_num_threads()
    try:
        found = sweep.run(base_of(tiny_chat_base, tmp_path), tmp_path, "second", groups.append, steps=8)
    finally:
        torch.set_num_threads(threads)
    assert groups == ["sweep second"]
    tokens, seconds, loss = found[:3]
    # Half of four candidates are dropped after a quarter of the steps.
    assert tokens.case == "sweep second, 4 x 8 steps: tokens" and tokens.value == pytest.approx(0.625, abs=0.05)
    assert seconds.value > 0 and (seconds.target, loss.target) == (0.45, 1.01)
    assert loss.met is True


def test_a_folder_without_the_files_is_refused(tiny_chat_base: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"first/valid\.jsonl"):
        sweep.run(base_of(tiny_chat_base, tmp_path), tmp_path, steps=4)
