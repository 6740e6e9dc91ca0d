"""The LoRA that is nearest to a change: against torch's own SVD, and as PEFT loads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from loramill.errors import InvalidRequest
from loramill.jobs.train.export.extract_lora import ExtractionReport, extract_lora, low_rank_factors
from loramill.jobs.train.methods.seeds import seeded
from loramill.types import TARGETS

from ..tiny_training import spec_of, tiny_model, write_files


def change_of(rows: int, columns: int, rank: int | None = None, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    if rank is None:
        return torch.randn(rows, columns, generator=draw)
    return torch.randn(rows, rank, generator=draw) @ torch.randn(rank, columns, generator=draw)


@settings(max_examples=40)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 50), st.integers(0, 99))
def test_no_matrix_of_the_rank_is_nearer(rows: int, columns: int, rank: int, seed: int) -> None:
    """Eckart and Young: the error of the truncated SVD is the smallest possible."""
    change = change_of(rows, columns, seed=seed)
    u, s, v = torch.linalg.svd(change.double(), full_matrices=False)
    found = low_rank_factors(change, rank)
    best = (u[:, :rank] * s[:rank]) @ v[:rank]
    assert found.a.shape == (min(rank, rows, columns), columns) and found.b.shape == (rows, len(found.a))
    assert found.a.dtype == found.b.dtype == torch.float32
    scale = s[0].item()
    torch.testing.assert_close(found.b.double() @ found.a.double(), best, rtol=0, atol=1e-4 * scale)
    assert found.squared_change == pytest.approx((s**2).sum().item(), rel=1e-9)
    assert found.squared_residual == pytest.approx((s[rank:] ** 2).sum().item(), rel=1e-5, abs=1e-10 * scale**2)
    # Halves of the singular values on either side, so that neither matrix is the small one.
    torch.testing.assert_close(found.a.norm(dim=1), found.b.norm(dim=0), rtol=1e-3, atol=1e-4 * scale**0.5)


def test_a_change_of_the_rank_is_extracted_exactly() -> None:
    change = change_of(24, 60, rank=3)
    found = low_rank_factors(change, 3)
    assert found.squared_residual / found.squared_change < 1e-12
    torch.testing.assert_close(found.b @ found.a, change, rtol=1e-4, atol=1e-4)


def test_zero_and_low_rank_changes_are_extracted() -> None:
    found = low_rank_factors(torch.zeros(5, 7), 2)
    assert (found.squared_change, found.squared_residual) == (0.0, 0.0) and not found.b.any() and not found.a.any()
    found = low_rank_factors(change_of(20, 30, rank=2), 8)
    assert (
        found.a.isfinite().all() and found.b.isfinite().all() and found.squared_residual / found.squared_change < 1e-12
    )


def changed(model: PreTrainedModel, size: float = 0.02) -> dict[str, torch.Tensor]:
    """Weights as if after some training."""
    draw = torch.Generator().manual_seed(5)
    return {
        name: each.detach().float() + size * torch.randn(each.shape, generator=draw)
        for name, each in model.named_parameters()
    }


def gpt2() -> PreTrainedModel:
    config = GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=64, n_positions=64)
    with seeded(torch.device("cpu"), "gpt2"):
        return GPT2LMHeadModel(config).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=torch.arange(24).view(2, 12)).logits
    return found


@pytest.mark.parametrize(
    ("make", "changes"),
    [
        (tiny_model, {"rank": 64, "alpha": 7.0}),
        (
            tiny_model,
            {"rank": 64, "targets": ("all-linear",), "rslora": True, "dropout": 0.3, "alpha_pattern": {"q_proj": 9}},
        ),
        (gpt2, {"rank": 96, "targets": ("all-linear",)}),
    ],
)
def test_at_full_rank_peft_equals_the_trained_linears(make: Any, changes: dict[str, Any], tmp_path: Path) -> None:
    """For any scale of the method, the adapter equals the change, and PEFT computes the same."""
    model = make()
    linears = {name for name, _ in model.named_parameters() if ".layers." in name or ".h." in name}
    weights = {
        name: weight if name in linears and weight.ndim == 2 else dict(model.named_parameters())[name].detach().clone()
        for name, weight in changed(model).items()
    }
    files, report = extract_lora(model, weights, spec_of(method="full", **changes), "tiny")
    assert report.error < 1e-6 and report.energy_of_all > 1 - 1e-9 and report.changes_left_out == {}
    loaded = PeftModel.from_pretrained(make(), write_files(tmp_path / "adapter", files))
    model.load_state_dict(weights, strict=False)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)


def test_the_report_names_changes_that_no_adapter_represents() -> None:
    model = tiny_model()
    weights = changed(model)
    spec = spec_of(method="full", rank=4, targets=("q_proj", "down_proj"), layers=(1,), rank_pattern={"down_proj": 2})
    files, report = extract_lora(model, weights, spec, "tiny")
    assert {(each.module, each.rank) for each in report.modules} == {
        ("model.layers.1.self_attn.q_proj", 4),
        ("model.layers.1.mlp.down_proj", 2),
    }
    before = dict(model.named_parameters())
    for each in report.modules:
        change = (weights[f"{each.module}.weight"] - before[f"{each.module}.weight"]).double()
        s = torch.linalg.svdvals(change)
        assert each.change == pytest.approx(s.norm().item(), rel=1e-6)
        assert each.error == pytest.approx((s[each.rank :].norm() / s.norm()).item(), rel=1e-5)
    assert set(report.changes_left_out) == set(before) - {f"{each.module}.weight" for each in report.modules}
    assert {"model.embed_tokens.weight", "model.norm.weight"} < set(report.changes_left_out)
    kept = sum(each.change**2 * (1 - each.error**2) for each in report.modules)
    everything = sum(float((weights[name] - before[name]).double().norm()) ** 2 for name in before)
    assert report.energy_of_all == pytest.approx(kept / everything, rel=1e-6)
    assert report.error == pytest.approx((1 - report.energy) ** 0.5)
    assert ExtractionReport.model_validate_json(report.model_dump_json()) == report
    assert extract_lora(model, weights, spec, "tiny")[0] == files


def test_a_missing_target_is_named() -> None:
    with pytest.raises(InvalidRequest, match="nose"):
        extract_lora(tiny_model(), changed(tiny_model()), spec_of(method="full", targets=(*TARGETS, "nose")), "tiny")
