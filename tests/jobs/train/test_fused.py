"""Which layers are fused on a GPU, and how many launches that saves; the kernels themselves in Triton's interpreter.

`TRITON_INTERPRET=1 pytest tests/jobs/train/fused_interpreted.py` runs the interpreted tests one by one.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.models.llama import modeling_llama

from loramill.jobs.train import forward
from loramill.jobs.train.forward import configured_forward, loss_and_accuracy, recomputed_layers
from loramill.jobs.train.methods import attach_adapter
from loramill.jobs.train.ops import layers
from loramill.jobs.train.ops.attention import VARLEN_NAMES
from loramill.jobs.train.ops.layers import fused_forwards, layer_forwards
from loramill.kernels import products, torch_backend, training
from loramill.kernels.attention import varlen
from loramill_bench.kernels import cuda_training, on_cuda

from ...llama import tiny_llama
from ...transformers_families import FAMILIES, tiny_family
from .tiny_training import NOWHERE, random_examples, spec_of, tiny_model

pytest.importorskip("triton")
from loramill.jobs.train.ops import fused

INTERPRETED = Path(__file__).with_name("fused_interpreted.py")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_the_fused_layers_equal_those_of_transformers_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(INTERPRETED)]
    done = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-5_000:]


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_mlps_and_rotations_of_each_family_are_fused(family: str) -> None:
    model = tiny_family(family)
    names = Counter(type(module).__name__ for module, _ in fused_forwards(model))
    all_names = Counter(type(module).__name__ for module in model.modules())
    kinds = ("RMSNorm", "MLP", "Attention")
    assert names == {f"{family}{kind}": all_names[f"{family}{kind}"] for kind in kinds}
    assert names[f"{family}Attention"] == 2 and names[f"{family}RMSNorm"] >= 5
    assert names[f"{family}MLP"] == (1 if family == "Qwen3Moe" else 2)


def test_only_norms_have_other_forwards_on_a_cpu() -> None:
    assert {type(module).__name__ for module, _ in layer_forwards(tiny_model(), CPU)} == {"LlamaRMSNorm"}
    assert not [*layer_forwards(tiny_family("Gemma2"), CPU)]


def test_layers_that_are_not_known_stay_and_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    layers._log_once.cache_clear()
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_positions=8, n_embd=8, n_layer=2, n_head=2)).requires_grad_(False)
    relu = tiny_llama(hidden_act="relu").requires_grad_(False)
    with caplog.at_level(logging.WARNING, logger=layers.__name__):
        for _ in range(2):
            assert not [*fused_forwards(gpt2)]
            assert {type(module).__name__ for module, _ in fused_forwards(relu)} == {"LlamaRMSNorm", "LlamaAttention"}
    messages = [record.getMessage() for record in caplog.records if record.name == layers.__name__]
    named = ["LayerNorm", "GPT2Attention", "GPT2MLP", "LlamaMLP"]
    assert len(messages) == len(named) and all(name in " ".join(messages) for name in named)


def test_a_norm_that_is_trained_is_not_fused() -> None:
    model = tiny_model()
    model.model.norm.weight.requires_grad_(True)
    assert model.model.norm not in [module for module, _ in fused_forwards(model)]


def test_layers_stay_where_triton_can_not_compile_its_launcher(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(_: torch.device) -> None:
        raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setattr(fused, "launch_once", fails)
    layers.triton_problem.cache_clear()
    with caplog.at_level(logging.WARNING, logger=layers.__name__):
        assert not [*layer_forwards(tiny_model(), CUDA)]
    layers.triton_problem.cache_clear()
    assert "Failed to find C compiler." in caplog.text


def test_a_model_on_a_gpu_is_fused_while_it_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(torch.bfloat16)
    monkeypatch.setattr(layers, "triton_problem", lambda _: None)
    monkeypatch.setattr(type(model), "device", CUDA)
    with configured_forward(model, 300):
        replaced = {type(module).__name__ for module in model.modules() if "forward" in vars(module)}
        assert replaced == {"LlamaRMSNorm", "LlamaMLP", "LlamaAttention"}
    assert not any("forward" in vars(module) for module in model.modules())


class Launches(TorchDispatchMode):
    """Counts the operations that compute: all but views and allocations."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        views = any(value.alias_info and not value.alias_info.is_write for value in func._schema.returns)
        if not views and not func.__name__.startswith(("empty", "new_empty", "_unsafe_view", "detach")):
            Launches.count += 1
        return func(*args, **(kwargs or {}))


def counted(outputs: Callable[..., Any]) -> Callable[..., Any]:
    """A function that only counts as one launch and returns memory for its outputs."""

    def launched(*args: Any, **options: Any) -> Any:
        Launches.count += 1
        return outputs(*args)

    return launched


def launches(layer_count: int, *, checkpointing: bool) -> tuple[int, int]:
    """Launches of a forward and of a backward pass of a step's second pass."""
    model = tiny_llama(torch.bfloat16, num_hidden_layers=layer_count).requires_grad_(False)
    found = []
    with (
        attach_adapter(model, spec_of(gradient_checkpointing=checkpointing), NOWHERE) as adapted,
        configured_forward(model, 300),
        recomputed_layers(model, checkpointing),
    ):
        loss_and_accuracy(model, model, random_examples(3), 10.0, packing=True)[0].backward()
        for weight in adapted.weights.values():
            weight.grad = torch.zeros_like(weight)
        with Launches():
            for number in range(2):
                Launches.count = 0
                if number == 0:
                    loss, _ = loss_and_accuracy(model, model, random_examples(1), 10.0, packing=True)
                else:
                    loss.backward()
                found.append(Launches.count)
    return found[0], found[1]


@pytest.mark.parametrize(
    ("fusing", "checkpointing", "expected"),
    [(False, False, (52, 116)), (False, True, (66, 181)), (True, False, (28, 73)), (True, True, (42, 114))],
)
def test_the_launches_of_a_layer(
    monkeypatch: pytest.MonkeyPatch, fusing: bool, checkpointing: bool, expected: tuple[int, int]
) -> None:
    def refused(*_: Any) -> torch.Tensor:
        raise AssertionError("keys and values are repeated")

    monkeypatch.setattr(modeling_llama, "repeat_kv", refused)
    monkeypatch.setattr(training, "backend", lambda _: torch_backend)  # a GPU has no native kernels
    monkeypatch.setattr(products, "_lacks_bfloat16", lambda: False)
    monkeypatch.setattr(forward, "_attention", lambda *_, **__: VARLEN_NAMES[False])
    monkeypatch.setattr(forward, "layer_forwards", lambda model, _: fused_forwards(model) if fusing else ())
    monkeypatch.setattr(fused, "launch", counted(lambda *_: None))
    monkeypatch.setattr(training, "_scaled_product", training._product_in_one)
    outputs = counted(lambda q, *_: (torch.empty_like(q), q.new_empty(q.shape[1], len(q), dtype=torch.float32)))
    monkeypatch.setattr(varlen, "forward", outputs)
    monkeypatch.setattr(varlen, "backward", counted(lambda _, *inputs: tuple(map(torch.empty_like, inputs[:3]))))
    fewer, more = (launches(count, checkpointing=checkpointing) for count in (2, 3))
    assert (more[0] - fewer[0], more[1] - fewer[1]) == expected


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_fused_layers_on_this_gpu_equal_those_of_transformers(
    monkeypatch: pytest.MonkeyPatch, family: str, dtype: torch.dtype
) -> None:
    model = tiny_family(family, dtype).to("cuda")
    found = []
    for fusing in (False, True, True):
        monkeypatch.setattr(forward, "layer_forwards", layer_forwards if fusing else lambda *_: ())
        with (
            attach_adapter(model, spec_of(), NOWHERE) as adapted,
            configured_forward(model, 300, deterministic=True),
        ):
            loss, _ = loss_and_accuracy(model, model, random_examples(6), 10.0, packing=True)
            loss.backward()
            gradients = [weight.grad for name, weight in adapted.weights.items() if name.endswith("lora_B.weight")]
            found.append([loss.detach(), *gradients])
    bound = {torch.float32: 1e-5, torch.bfloat16: 2**-7}[dtype]
    for unfused, first, second in zip(*found, strict=True):
        assert torch.equal(first, second)
        assert (first - unfused).norm() <= bound * unfused.norm()


@pytest.mark.gpu
def test_the_kernels_are_right_on_this_gpu() -> None:
    wrong = [check for check in cuda_training.check() if not check.passed]
    assert not wrong, "\n".join(map(str, wrong))


def test_the_bench_reports_fused_layers_against_their_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_training, "timing", lambda case: cuda_training.Timing(7.0, 5.0, 40.0))
    results = on_cuda.groups()["cuda training norm 4096x4096"]()
    assert {result.case: (result.value, result.floor) for result in results} == {
        "cuda training norm 4096x4096: fused": (7.0, 5.0),
        "cuda training norm 4096x4096: by transformers": (40.0, 5.0),
    }
