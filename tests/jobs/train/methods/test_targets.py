"""Which linears a spec adapts: PEFT's choice, or a refusal that names what matches nothing."""

from __future__ import annotations

import math
from typing import Any

import pytest
from peft import get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from loramill.errors import InvalidRequest
from loramill.jobs.train.methods.peft_folder import lora_config
from loramill.jobs.train.methods.targets import TargetModule, find_target_modules
from loramill.models.catalog import Base
from loramill.types import JobSpec

from .method_training import load_model, spec_of


def of_peft(model: PreTrainedModel, spec: JobSpec, found: list[TargetModule]) -> dict[str, tuple[int, float]]:
    """Rank and scale by module, as PEFT would load what is written."""
    modules = get_peft_model(model, lora_config(spec, modules=[target.name for target in found])).named_modules()
    found = {name: module for name, module in modules if hasattr(module, "lora_A")}
    return {
        name.removeprefix("base_model.model."): (module.r["default"], pytest.approx(module.scaling["default"]))
        for name, module in found.items()
    }


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("layers", [None, (1,), (0, 2)])
@pytest.mark.parametrize("targets", [("q_proj", "down_proj"), ("all-linear",), ("self_attn.k_proj", "lm_head")])
@pytest.mark.parametrize(
    "patterns",
    [
        {},
        {"rank_pattern": {"k_proj": 2}, "alpha_pattern": {"k_proj": 3.5}},
        {"rank_pattern": {r"model\.layers\..*\.self_attn\.k_proj": 8, "k_proj": 2, ".*_proj": 3}},
    ],
    ids=["plain", "names", "expressions"],
)
def test_targets_equal_those_of_peft(
    small: Base, targets: tuple[str, ...], layers: tuple[int, ...] | None, patterns: dict[str, Any], rslora: bool
) -> None:
    spec = spec_of(targets=targets, layers=layers, rslora=rslora)
    spec = spec.model_copy(update=patterns if "q_proj" not in targets else {"alpha_pattern": {"down_proj": 7.0}})
    found = find_target_modules(load_model(small), spec)
    assert {target.name: (target.rank, target.scale) for target in found} == of_peft(load_model(small), spec, found)


def test_all_linear_leaves_the_head_alone(small: Base) -> None:
    names = {target.name for target in find_target_modules(load_model(small), spec_of(targets=("all-linear",)))}
    assert len(names) == 3 * 7 and not any("lm_head" in name for name in names)


def test_a_layer_of_transposed_weights_is_a_linear_too() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=64))
    spec = spec_of(targets=("all-linear",), layers=(1,))
    found = find_target_modules(model, spec)
    assert {target.name: (target.rank, target.scale) for target in found} == of_peft(model, spec, found)
    assert {target.name.rpartition(".")[2]: target.shape for target in found}["c_attn"] == (48, 16)
    assert math.isclose(found[0].scale, 1.5)


@pytest.mark.parametrize(
    ("param", "message", "changes"),
    [
        ("targets", "no linears named nope, v", {"targets": ("q_proj", "nope", "v")}),
        ("targets", "no linears named embed_tokens", {"targets": ("embed_tokens",)}),
        ("targets", "must be the only target", {"targets": ("all-linear", "q_proj")}),
        ("layers", "names 3, 9; .* 0 to 2", {"layers": (1, 3, 9)}),
        ("layers", "names none", {"layers": ()}),
        ("layers", "names 0; .* none", {"targets": ("lm_head",), "layers": (0,)}),
        ("rank_pattern", "'gate' matches", {"rank_pattern": {"q_proj": 2, "gate": 2}}),
        ("rank_pattern", "'down_proj' matches", {"targets": ("q_proj",), "rank_pattern": {"down_proj": 2}}),
        ("rank_pattern", "not a regular expression", {"rank_pattern": {"(": 2}}),
        ("rank_pattern", "rank 0", {"rank_pattern": {"q_proj": 0}}),
        ("alpha_pattern", "'layers.7.q_proj' matches", {"alpha_pattern": {"layers.7.q_proj": 2.0}}),
    ],
)
def test_a_pattern_that_matches_nothing_is_named(
    small: Base, param: str, message: str, changes: dict[str, Any]
) -> None:
    with pytest.raises(InvalidRequest, match=message) as refused:
        find_target_modules(load_model(small), spec_of(**changes))
    assert refused.value.param == f"loramill.{param}"
