"""Which linears a job adapts, by name."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from loramill.errors import InvalidRequest
from loramill.models.targets import find_targets, layer_of, rank_of, scale_of
from loramill.types import JobSpec

NAMES = [f"model.layers.{layer}.{name}" for layer in range(3) for name in ("self_attn.q_proj", "mlp.up_proj")]
NAMES += ["lm_head"]


def spec(**fields: Any) -> JobSpec:
    return JobSpec(base="0" * 64, adapter="acme/a", train="file-1", steps=1, batch_size=1, **fields)


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"targets": ("q_proj",)}, NAMES[:6:2]),
        ({"targets": ("mlp.up_proj",), "layers": (0, 2)}, [NAMES[1], NAMES[5]]),
        ({"targets": ("all-linear",)}, NAMES[:6]),
        ({"targets": ("lm_head",)}, ["lm_head"]),
        ({"targets": ("up_proj", "lm_head"), "layers": (1,)}, [NAMES[3], "lm_head"]),
    ],
)
def test_targets_match_full_names_or_their_last_parts(fields: dict[str, Any], found: list[str]) -> None:
    assert find_targets(spec(**fields), NAMES, head="lm_head") == found


@pytest.mark.parametrize(
    ("param", "fields"),
    [
        ("targets", {"targets": ("proj",)}),
        ("targets", {"targets": ("all-linear", "q_proj")}),
        ("layers", {"targets": ("q_proj",), "layers": (1, 3)}),
        ("layers", {"targets": ("lm_head",), "layers": (0,)}),
        ("rank_pattern", {"targets": ("q_proj",), "rank_pattern": {"up_proj": 4}}),
        ("rank_pattern", {"targets": ("q_proj",), "rank_pattern": {"q_proj": 0}}),
        ("alpha_pattern", {"targets": ("q_proj",), "alpha_pattern": {"(": 4.0}}),
    ],
)
def test_the_field_that_matches_nothing_is_named(param: str, fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as refused:
        find_targets(spec(**fields), NAMES, head="lm_head")
    assert refused.value.param == f"loramill.{param}"


@given(
    st.lists(st.sampled_from(["q_proj", "0.self_attn.q_proj", ".*_proj", r"layers\.[12]\..*", "proj"]), unique=True),
    st.sampled_from(NAMES),
)
def test_patterns_match_as_in_peft(patterns: list[str], name: str) -> None:
    ranks = {pattern: number for number, pattern in enumerate(patterns, start=1)}
    alphas = {pattern: float(number) for pattern, number in ranks.items()}
    job = spec(rank=100, alpha=50.0, rank_pattern=ranks, alpha_pattern=alphas)
    key = get_pattern_key(patterns, name)
    assert rank_of(job, name) == ranks.get(key, 100)
    assert scale_of(job, name) == alphas.get(key, 50.0) / ranks.get(key, 100)


def test_a_layer_is_the_first_number_in_a_path() -> None:
    assert layer_of("model.layers.3.mlp.experts.0.up_proj") == 3
    assert layer_of("h.11.attn.c_attn") == 11 and layer_of("lm_head") is None
