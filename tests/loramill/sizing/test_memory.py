"""The prediction against the memory that training takes: torch's allocations, and the growth of the process."""

from __future__ import annotations

import random
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

from loramill.data.encoding import EncodedExample
from loramill.jobs.train import forward
from loramill.jobs.train.context import TrainContext
from loramill.jobs.train.forward import configured_forward, loss_and_accuracy, recomputed_layers
from loramill.jobs.train.loop import train
from loramill.jobs.train.methods import attach_adapter
from loramill.jobs.train.ops.attention import VARLEN_NAMES
from loramill.jobs.train.ops.layers import fused_forwards
from loramill.kernels import torch_backend, training
from loramill.kernels.attention import varlen
from loramill.sizing import anatomy
from loramill.sizing.memory import estimate
from loramill.sizing.passes import MemoryRow, activations, largest_row
from loramill.sizing.targets import trained_elements
from loramill.types import ATTENTION_TARGETS, JobSpec
from loramill_bench.training.memory import CPU_ERROR, Case, measure_peak, predict

from ...transformers_families import tiny_family

LENGTH, SUPERVISED = 64, 0.25


SIZES: dict[str, Any] = {
    "vocab_size": 2000,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}
MOE: dict[str, Any] = {"moe_intermediate_size": 128, "num_experts": 8, "num_experts_per_tok": 4, "head_dim": 32}
ATTENTION: dict[str, Any] = {"targets": ATTENTION_TARGETS}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rank": 32, "dropout": 0.1},
        {"targets": ("q_proj", "v_proj"), "layers": (2, 4)},
        {"micro_tokens": 1024},
        {"micro_tokens": 1024, "gradient_checkpointing": True},
        {"packing": False},
        {"method": "dora"},
        {"method": "adalora", "rank": 8},
        {"method": "pissa"},
        {"dtype": torch.float32},
        {"dtype": torch.float32, "gradient_checkpointing": True},
    ],
    ids=str,
)
def test_torch_allocates_the_predicted_size(options: dict[str, Any], tmp_path: Path) -> None:
    assert_allocates(LlamaConfig(**SIZES), options, tmp_path, 0.06)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("config", "own"),
    [
        (Gemma2Config(**SIZES, head_dim=32), {}),
        (Gemma3TextConfig(**SIZES, head_dim=32), {}),
        (Qwen3MoeConfig(**SIZES, **MOE), ATTENTION),
    ],
    ids=["gemma2", "gemma3", "qwen3 moe"],
)
def test_torch_allocates_about_the_predicted_size_for_other_families(
    config: PreTrainedConfig, own: dict[str, Any], checkpointing: bool, tmp_path: Path
) -> None:
    options = {"micro_tokens": 1024, "gradient_checkpointing": checkpointing}
    assert_allocates(config, own | options, tmp_path, 0.1)


def assert_allocates(config: PreTrainedConfig, options: dict[str, Any], tmp_path: Path, error: float) -> None:
    own = {name: value for name, value in options.items() if name != "dtype"}
    dtype = options.get("dtype", torch.bfloat16)
    spec = JobSpec.model_validate(
        {"base": "0" * 64, "adapter": "a/b", "train": "t", "steps": 2, "batch_size": 32, "micro_tokens": 256} | own
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(dtype).requires_grad_(False).eval()
    draw = random.Random(0)
    examples = [
        EncodedExample(tuple(draw.randrange(2000) for _ in range(LENGTH)), round(LENGTH * (1 - SUPERVISED)))
        for _ in range(32)
    ]
    context = TrainContext(
        spec=spec, train_examples=examples, base_folder=tmp_path, checkpoints=tmp_path / "checkpoints"
    )
    steps = train(model, context)
    with closing(steps), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        next(steps)
    row = largest_row(spec, [LENGTH], SUPERVISED, shared_prefixes=False)
    needed = estimate(
        spec, anatomy(config.to_dict() | {"architectures": [type(model).__name__]}), "none", row, "cpu", dtype.itemsize
    )
    sizes = {item.name: item.bytes for item in needed.items}
    # torch's allocator counts neither the process nor malloc's fragmentation; the base is loaded before, and a
    # checkpoint is written only at the end.
    visible = sum(size for name, size in sizes.items() if name not in ("framework", "fragments", "base", "checkpoint"))
    assert visible == pytest.approx(peak(profiled), rel=error)


@pytest.mark.parametrize("options", [{}, {"targets": ("q_proj", "v_proj")}, {"gradient_checkpointing": True}], ids=str)
@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Gemma3"])
def test_a_gpu_saves_the_predicted_tensors_of_a_layer(
    family: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model computes on the CPU as on a GPU, but kernels leave their outputs as they are allocated."""
    pytest.importorskip("triton")
    from loramill.jobs.train.ops import fused

    monkeypatch.setattr(fused, "launch", lambda *_, **__: None)
    monkeypatch.setattr(forward, "layer_forwards", lambda model, _: fused_forwards(model))
    monkeypatch.setattr(forward, "_attention", lambda *_, **__: VARLEN_NAMES[False])
    monkeypatch.setattr(varlen, "forward", lambda q, *_, **__: (torch.empty_like(q), torch.empty(q.shape[1], len(q))))
    monkeypatch.setattr(training, "backend", lambda _: torch_backend)
    spec = JobSpec.model_validate(
        {"base": "0" * 64, "adapter": "a/b", "train": "t", "steps": 2, "batch_size": 1} | options
    )
    examples = [EncodedExample(tuple(range(LENGTH)), LENGTH - 1)]
    row = MemoryRow(tokens=LENGTH, width=LENGTH, supervised_tokens=1, step_tokens=LENGTH, eager=False)
    saved, predicted = [], []
    for layers in (2, 3):
        model = tiny_family(family, torch.bfloat16, num_hidden_layers=layers, vocab_size=LENGTH)
        with (
            attach_adapter(model, spec, Path()),
            configured_forward(model, LENGTH),
            recomputed_layers(model, spec.gradient_checkpointing),
        ):
            saved.append(saved_bytes(model, examples))
        base = anatomy(model.config.to_dict() | {"architectures": [type(model).__name__]})
        predicted.append(activations(spec, base, trained_elements(spec, base), row, "cuda").bytes)
    assert saved[1] - saved[0] == pytest.approx(predicted[1] - predicted[0], rel=0.01)


def saved_bytes(model: PreTrainedModel, examples: list[EncodedExample]) -> int:
    """Bytes that a pass saves for its backward pass, each tensor once and without parameters."""
    kept: dict[int, torch.UntypedStorage] = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = loss_and_accuracy(model, model, examples, 1.0, packing=True)
    assert result[0].requires_grad
    return sum(storage.nbytes() for storage in kept.values())


def peak(profiled: profile) -> int:
    """The most bytes that were allocated at once since profiling began."""
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@pytest.mark.skipif(torch.cuda.is_available(), reason="`loramill-bench train` measures the GPU")
def test_memory_grows_to_the_predicted_size() -> None:
    case = Case("small", rank=4, targets=("q_proj", "v_proj"), batch_size=2, length=64, micro_tokens=128)
    device, measured = measure_peak(case)
    assert predict(case, device).bytes == pytest.approx(measured, rel=CPU_ERROR)
