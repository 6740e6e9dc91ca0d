"""Kills, pauses, full memory or disk, non-finite numbers: a job resumes to the same bits, or reports the reason."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from loramill.errors import (
    ArtifactCorrupt,
    ArtifactMissing,
    DiskFull,
    JobCancelled,
    JobPaused,
    JobPreempted,
    OutOfMemory,
    TrainingDiverged,
)
from loramill.jobs.train.batching import choose_batch
from loramill.jobs.train.checkpoint import latest
from loramill.jobs.train.export.adapter import export_adapter

from .tiny_training import random_examples, spec_of, tiny_model, train, train_and_export

HELD_OUT = random_examples(4, seed=1)
FILE = "adapter_model.safetensors"

METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "lora+": {"loraplus_lr_ratio": 8.0, "rslora": True},
    "dora": {"method": "dora"},
    "adalora": {"method": "adalora"},
    "pissa": {"method": "pissa"},
    "loftq": {"method": "loftq"},
    "checkpointing": {"gradient_checkpointing": True},
    "unpacked": {"packing": False, "micro_tokens": 40},
    "epochs": {"epochs": 2, "steps": 10},
}


@pytest.fixture
def quantized(tmp_path: Path) -> Callable[[], PreTrainedModel]:
    """Makes a tiny base of rounded values; its folder has the original values."""
    tiny_model().save_pretrained(tmp_path / "base")

    def make() -> PreTrainedModel:
        model = tiny_model()
        with torch.no_grad():
            for module in model.model.layers.modules():
                if isinstance(module, nn.Linear):
                    module.weight.copy_((module.weight * 64).round() / 64)
        return model

    return make


@pytest.mark.parametrize("method", METHODS)
def test_a_stopped_job_resumes_to_the_same_bits(
    tmp_path: Path, quantized: Callable[[], PreTrainedModel], method: str
) -> None:
    """Wherever it stops: optimizer, schedule, order, dropout, the method's state, the best weights, patience."""
    spec = spec_of(
        dropout=0.2,
        weight_decay=0.1,
        eval_every=3,
        patience=2,
        keep="best",
        steps=7,
        micro_tokens=60,
        schedule="cosine",
    ).model_copy(update=METHODS[method])
    more = {"valid": HELD_OUT, "base_folder": tmp_path / "base"}
    whole = train_and_export(quantized(), spec, tmp_path / "whole", **more)
    # After a checkpoint, after a validation and between two; after every step with plain LoRA.
    for after in range(1, 8) if method == "lora" else (2, 3, 5):
        folder = tmp_path / f"stopped after {after}"
        running = train(
            quantized(), random_examples(23), HELD_OUT, spec, base_folder=tmp_path / "base", checkpoints=folder
        )
        for _ in range(after):
            next(running)
        running.close()
        assert train_and_export(quantized(), spec, folder, **more) == whole


def test_a_paused_job_loses_no_step(tmp_path: Path) -> None:
    """The request arrives before each forward pass in turn, those of a validation included."""
    spec = spec_of(dropout=0.2, eval_every=3, checkpoint_every=50, keep="best", micro_tokens=25)
    passes = 0

    def count() -> None:
        nonlocal passes
        passes += 1

    whole = train_and_export(tiny_model(), spec, tmp_path / "whole", valid=HELD_OUT, raise_if_stopped=count)
    assert passes > 15
    for last in range(1, passes):
        folder, left, error = tmp_path / str(last), iter(range(last)), (JobPaused, JobPreempted)[last % 2]

        def stop(left: Any = left, error: type[Exception] = error) -> None:
            if next(left, None) is None:
                raise error("now")

        points = []
        with pytest.raises(error):
            for point in train(
                tiny_model(), random_examples(23), HELD_OUT, spec, checkpoints=folder, raise_if_stopped=stop
            ):
                points.append(point)
        rest = list(train(tiny_model(), random_examples(23), HELD_OUT, spec, checkpoints=folder))
        assert [point.step for point in (*points, *rest)] == [1, 2, 3, 4, 5, 6]
        assert [point.step for point in (*points, *rest) if point.valid_loss is not None] == [3, 6]
        assert export_adapter(folder, spec, base="tiny") == whole


def test_a_cancelled_job_ends_before_its_next_pass(tmp_path: Path) -> None:
    calls = iter([None, None])

    def stop() -> None:
        if next(calls, 0) is not None:
            raise JobCancelled("now")

    with pytest.raises(JobCancelled):
        list(
            train(
                tiny_model(),
                random_examples(23),
                [],
                spec_of(micro_tokens=1000, checkpoint_every=50),
                checkpoints=tmp_path,
                raise_if_stopped=stop,
            )
        )
    assert not list(tmp_path.iterdir())


KILLED = """
import sys, time
from pathlib import Path
from tests.jobs.train.tiny_training import random_examples, spec_of, tiny_model, train
spec = spec_of(dropout=0.2, steps=25)
for point in train(tiny_model(), random_examples(23), [], spec, checkpoints=Path(sys.argv[1])):
    print(point.step, flush=True)
    if point.step == 13:
        time.sleep(600)
"""


def test_a_killed_job_resumes_to_the_same_bits(tmp_path: Path) -> None:
    spec = spec_of(dropout=0.2, steps=25)
    whole = train_and_export(tiny_model(), spec, tmp_path / "whole")
    command = [sys.executable, "-c", KILLED, str(tmp_path / "killed")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[3]) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) == 13:
                process.send_signal(signal.SIGKILL)
                break
    assert process.returncode == -signal.SIGKILL
    with pytest.raises(ArtifactMissing, match="step 25"):
        export_adapter(tmp_path / "killed", spec, base="tiny")
    rest = list(train(tiny_model(), random_examples(23), [], spec, checkpoints=tmp_path / "killed"))
    assert 13 <= rest[0].step < 25
    assert export_adapter(tmp_path / "killed", spec, base="tiny") == whole


def test_checkpoints_can_be_at_a_url(tmp_path: Path) -> None:
    spec, folder = spec_of(dropout=0.2), f"memory://{tmp_path.name}/job"
    running = train(tiny_model(), random_examples(23), [], spec, checkpoints=folder)
    for _ in range(3):
        next(running)
    running.close()
    rest = list(train(tiny_model(), random_examples(23), [], spec, checkpoints=folder))
    assert [point.step for point in rest] == [3, 4, 5, 6]
    assert export_adapter(folder, spec, base="tiny") == train_and_export(
        tiny_model(), spec, (tmp_path / "local").as_uri()
    )


# Memory


def no_memory() -> None:
    torch.empty(2**60)  # the error of torch's own allocator on a CPU


def no_gpu_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")


def no_python_memory() -> None:
    raise MemoryError


@pytest.mark.parametrize("fail", [no_memory, no_gpu_memory, no_python_memory])
def test_out_of_memory_is_reported_with_what_to_change(tmp_path: Path, fail: Callable[[], None]) -> None:
    model = tiny_model()
    model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: fail())
    with pytest.raises(OutOfMemory, match=r"pass of 64 tokens .* with 'micro_tokens' 32"):
        next(train(model, random_examples(23), [], spec_of(micro_tokens=64), checkpoints=tmp_path))
    with pytest.raises(OutOfMemory, match=r"pass of 20 tokens .*'gradient_checkpointing'"):
        next(train(model, random_examples(23), [], spec_of(micro_tokens=64), checkpoints=tmp_path, micro_tokens=20))


def test_other_errors_are_not_reported_as_out_of_memory(tmp_path: Path) -> None:
    model = tiny_model()
    model.model.layers[1].mlp.register_forward_pre_hook(lambda _, x: x[0] @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="size mismatch"):
        next(train(model, random_examples(23), [], spec_of(), checkpoints=tmp_path))


def test_an_error_of_the_gpu_is_not_reported_as_out_of_memory(tmp_path: Path) -> None:
    def broken(*_: object) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    model = tiny_model()
    model.model.layers[1].mlp.register_forward_pre_hook(broken)
    with pytest.raises(torch.AcceleratorError, match="illegal memory access"):
        next(train(model, random_examples(23), [], spec_of(), checkpoints=tmp_path))


def test_smaller_passes_resume_to_the_same_result(tmp_path: Path) -> None:
    """From the checkpoints of the larger ones, and to rounding: the batch of a step is the same."""
    spec = spec_of(micro_tokens=200)
    whole = list(train(tiny_model(), random_examples(23), HELD_OUT, spec, checkpoints=tmp_path / "whole"))
    running = train(tiny_model(), random_examples(23), HELD_OUT, spec, checkpoints=tmp_path / "job")
    for _ in range(2):
        next(running)
    running.close()
    passes: list[int] = []
    rest = list(
        train(
            tiny_model(),
            random_examples(23),
            HELD_OUT,
            spec,
            checkpoints=tmp_path / "job",
            micro_tokens=30,
            raise_if_stopped=lambda: passes.append(1),
        )
    )
    assert len(passes) > 2 * len(rest)
    for ours, theirs in zip(rest, whole[2:], strict=True):
        assert (ours.step, ours.trained_tokens) == (theirs.step, theirs.trained_tokens)
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)
        assert ours.valid_loss == (None if theirs.valid_loss is None else pytest.approx(theirs.valid_loss, rel=1e-5))


# Numbers that aren't finite


def poisoned() -> PreTrainedModel:
    """A base that no example with token 61 can be trained on."""
    model = tiny_model()
    model.model.embed_tokens.register_forward_hook(
        lambda _, tokens, found: found.masked_fill(tokens[0][..., None] == 61, torch.nan)
    )
    return model


def test_a_loss_of_nan_ends_the_job_and_names_its_examples(tmp_path: Path) -> None:
    examples = random_examples(23)
    spec = spec_of(steps=30, checkpoint_every=1)
    bad = choose_batch(23, 5, 3, spec.seed)[2]
    tokens = examples[bad].tokens
    examples[bad] = type(examples[bad])((61, *tokens[1:]), examples[bad].prompt_length, line=100 + bad)
    seen = []
    with pytest.raises(
        TrainingDiverged, match=r"step 4 of 30: loss nan.*lower learning rate.*before it is of step 3"
    ) as caught:
        for point in train(poisoned(), examples, [], spec, checkpoints=tmp_path):
            seen.append(point.step)
    assert seen == [1, 2, 3]
    assert caught.value.examples == tuple(examples[index].line for index in choose_batch(23, 5, 3, spec.seed))
    assert 101 + bad - 1 in caught.value.examples and str(100 + bad) in caught.value.message
    last = latest(tmp_path, spec)
    assert last is not None and last.run_state.step == 3
    assert all(tensor.isfinite().all() for tensor in last.weights.values())


def test_a_gradient_of_nan_ends_the_job(tmp_path: Path) -> None:
    model = tiny_model()
    model.model.layers[0].input_layernorm.register_full_backward_hook(lambda _, given, __: (given[0] * torch.inf,))
    model.model.layers[0].mlp.register_full_backward_hook(lambda _, given, __: (given[0] * torch.nan,))
    with pytest.raises(TrainingDiverged, match=r"step 1 of 6: loss \d.*gradient norm nan") as caught:
        next(train(model, random_examples(9), [], spec_of(), checkpoints=tmp_path))
    assert len(caught.value.examples) == 5


def test_a_validation_loss_of_nan_ends_the_job(tmp_path: Path) -> None:
    bad = [type(HELD_OUT[0])((61, *HELD_OUT[0].tokens[1:]), HELD_OUT[0].prompt_length)]
    with pytest.raises(TrainingDiverged, match="step 2 of 6: validation loss nan"):
        list(train(poisoned(), random_examples(9), bad, spec_of(), checkpoints=tmp_path))


def test_divergence_is_reported(tmp_path: Path) -> None:
    with pytest.raises(TrainingDiverged, match=r"step \d of 6.*lower learning rate"):
        list(train(tiny_model(), random_examples(9), [], spec_of(learning_rate=1e38), checkpoints=tmp_path))


# Disks


def test_a_full_disk_ends_the_attempt_and_the_next_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of(dropout=0.2)
    whole = train_and_export(tiny_model(), spec, tmp_path / "whole")
    running = train(tiny_model(), random_examples(23), [], spec, checkpoints=tmp_path / "job")
    next(running), next(running)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(DiskFull):
            list(running)
    assert train_and_export(tiny_model(), spec, tmp_path / "job") == whole


def test_an_unreadable_checkpoint_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of()
    train_and_export(tiny_model(), spec, tmp_path)

    def broken(_: Path) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "read_bytes", broken)
    with pytest.raises(ArtifactCorrupt, match="can't be read"):
        next(train(tiny_model(), random_examples(23), [], spec, checkpoints=tmp_path))
    with pytest.raises(ArtifactCorrupt, match="can't be read"):
        export_adapter(tmp_path, spec, base="tiny")
