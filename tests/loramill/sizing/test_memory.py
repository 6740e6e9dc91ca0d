"""The prediction against the memory that training takes: torch's allocations, and the growth of the process."""

from __future__ import annotations

import random
from contextlib import closing
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from loramill.data.encoding import EncodedExample
from loramill.jobs.train.loop import TrainContext, train
from loramill.sizing import anatomy
from loramill.sizing.memory import estimate, largest_row
from loramill.types import JobSpec
from loramill_bench.training.memory import CPU_ERROR, Case, measure_peak, predict

LENGTH, SUPERVISED = 64, 0.25


@pytest.fixture(scope="module")
def config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=2000,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )


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
def test_torch_allocates_the_predicted_size(config: LlamaConfig, options: dict[str, object], tmp_path: Path) -> None:
    own = {name: value for name, value in options.items() if name != "dtype"}
    dtype = options.get("dtype", torch.bfloat16)
    spec = JobSpec.model_validate(
        {"base": "0" * 64, "adapter": "a/b", "train": "t", "steps": 2, "batch_size": 32, "micro_tokens": 256} | own
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(dtype).requires_grad_(False).eval()
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
        spec, anatomy(config.to_dict() | {"architectures": ["LlamaForCausalLM"]}), "none", row, "cpu", dtype.itemsize
    )
    sizes = {item.name: item.bytes for item in needed.items}
    # torch's allocator counts neither the process nor malloc's fragmentation; the base is loaded before, and a
    # checkpoint is written only at the end.
    visible = sum(size for name, size in sizes.items() if name not in ("framework", "fragments", "base", "checkpoint"))
    assert visible == pytest.approx(peak(profiled), rel=0.06)


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
