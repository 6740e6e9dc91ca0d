"""Full fine-tuning by DeepSpeed against a plain loop, across stops, and its results as PEFT, transformers and the
engine load them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

from loramill.data.tokenizer import ChatTokenizer
from loramill.errors import ArtifactMissing, JobPaused, TrainingDiverged
from loramill.jobs.train import checkpoint
from loramill.jobs.train.batching import choose_batch
from loramill.jobs.train.context import TrainingProgress
from loramill.jobs.train.deepspeed import zero_optimizer
from loramill.jobs.train.distributed import SINGLE_PROCESS
from loramill.jobs.train.full_finetune import REPORT_FILE, FullFinetuneResult, export_full, train_full
from loramill.jobs.train.lr_schedule import learning_rate
from loramill.jobs.train.methods.adapted_model import AdaptedModel
from loramill.jobs.worker.worker import Worker, run_next_job
from loramill.kernels.quantization import Quantization
from loramill.models.catalog import Base, find_base, load_for_training
from loramill.names import AdapterName
from loramill.registry import Registry, datasets, jobs, tenants
from loramill.registry.database.migrate import migrate
from loramill.serve.offline import OfflineEngine
from loramill.serve.protocol import TextRequest
from loramill.serve.sampling_params import SamplingParams
from loramill.settings import JobSettings, ServeSettings
from loramill.submission.defaults import resolve_spec
from loramill.submission.request import JobRequest, LoramillOptions
from loramill.types import JobSpec

from ..conftest import base_of
from .tiny_training import (
    context_of,
    random_examples,
    reference_loss,
    spec_of,
    tiny_model,
    train,
    train_and_export,
    write_files,
)

CPU = torch.device("cpu")
OFFLOAD = ("none", "optimizer", "all")


@pytest.fixture
def tiny_base(tiny_base_folder: Path, tmp_path: Path) -> Base:
    return base_of(tiny_base_folder, tmp_path)


def full(**changes: Any) -> JobSpec:
    return spec_of(**{"method": "full", "learning_rate": 1e-2, "weight_decay": 0.1, "rank": 8} | changes)


def start(
    base: Base, spec: JobSpec, checkpoints: Path, valid: int = 0, **more: Any
) -> Generator[TrainingProgress, None, None]:
    examples, held_out = random_examples(23), random_examples(valid, seed=1)
    context = context_of(examples, held_out, spec, base_folder=base.folder, checkpoints=checkpoints, **more)
    return train_full(base, context, device=CPU)


def points(base: Base, spec: JobSpec, checkpoints: Path, valid: int = 0, **more: Any) -> list[TrainingProgress]:
    return list(start(base, spec, checkpoints, valid, **more))


def exported(base: Base, spec: JobSpec, checkpoints: Path, folder: Path) -> FullFinetuneResult:
    folder.mkdir()
    return export_full(checkpoints, spec, base=base, folder=folder)


@pytest.mark.parametrize("micro_tokens", [16, 1000])
@pytest.mark.parametrize("offload", OFFLOAD)
def test_deepspeed_equals_torch(tmp_path: Path, offload: str, micro_tokens: int) -> None:
    """In float32: figures and weights of the whole run are those of torch's AdamW on all parameters."""
    spec = full(offload=offload, micro_tokens=micro_tokens)

    @contextmanager
    def by_torch(model: PreTrainedModel, spec: JobSpec, folder: Path) -> Iterator[AdaptedModel]:
        yield AdaptedModel(model, dict(model.named_parameters()), lambda on: None)

    @contextmanager
    def by_deepspeed(model: PreTrainedModel, spec: JobSpec, folder: Path) -> Iterator[AdaptedModel]:
        with zero_optimizer(model, spec, CPU, SINGLE_PROCESS) as update:
            yield AdaptedModel(update.model, update.weights, lambda on: None, optimizer=update)

    found = {}
    for name, attach in (("torch", by_torch), ("deepspeed", by_deepspeed)):
        model, folder = tiny_model().requires_grad_(True), tmp_path / name
        found[name] = list(
            train(model, random_examples(23), random_examples(7, seed=1), spec, checkpoints=folder, attach=attach)
        )
    for ours, theirs in zip(found["deepspeed"], found["torch"], strict=True):
        assert (ours.step, ours.trained_tokens, ours.learning_rate) == (
            theirs.step,
            theirs.trained_tokens,
            theirs.learning_rate,
        )
        assert (ours.loss, ours.grad_norm) == pytest.approx((theirs.loss, theirs.grad_norm), rel=2e-4)
        assert ours.valid_loss == (theirs.valid_loss and pytest.approx(theirs.valid_loss, rel=2e-4))
    one, other = (checkpoint.latest(tmp_path / name, spec) for name in ("torch", "deepspeed"))
    assert one is not None and other is not None
    for part in ("weights", "first_moments", "second_moments"):
        for name, tensor in getattr(one, part).items():
            torch.testing.assert_close(getattr(other, part)[name], tensor, rtol=2e-3, atol=1e-5)


def test_the_model_is_in_bfloat16_and_its_checkpoint_in_float32(tiny_base: Base, tmp_path: Path) -> None:
    """The mixed precision of the plain loop that everybody writes; norms and the embedding are trained, too."""
    spec = full(learning_rate=2e-3)
    found = points(tiny_base, spec, tmp_path / "job", valid=7)
    model = load_for_training(tiny_base, torch.bfloat16).requires_grad_(True)
    masters = [parameter.detach().float() for parameter in model.parameters()]
    start = [master.clone() for master in masters]
    optimizer = torch.optim.AdamW(masters, weight_decay=0.1)
    examples = random_examples(23)
    for step, point in enumerate(found):
        loss, _ = reference_loss(model, [examples[index] for index in choose_batch(23, 5, step, spec.seed)])
        loss.backward()
        for master, parameter in zip(masters, model.parameters(), strict=True):
            assert parameter.grad is not None
            master.grad, parameter.grad = parameter.grad.float(), None
        norm = torch.nn.utils.clip_grad_norm_(masters, spec.max_grad_norm)
        # Both round to bfloat16 at each operation, but in other places.
        assert point.loss == pytest.approx(loss.item(), rel=1e-2)
        assert point.grad_norm == pytest.approx(norm.item(), rel=6e-2)
        optimizer.param_groups[0]["lr"] = learning_rate(spec, step)
        optimizer.step()
        with torch.no_grad():
            for master, parameter in zip(masters, model.parameters(), strict=True):
                parameter.copy_(master)
    last = checkpoint.latest(tmp_path / "job", spec)
    assert last is not None
    for (name, _), master, before in zip(model.named_parameters(), masters, start, strict=True):
        assert (last.weights[name] - master).norm() < 0.2 * (master - before).norm(), name
        assert not torch.equal(last.weights[name], last.weights[name].bfloat16().float())


@pytest.mark.parametrize("offload", OFFLOAD)
@pytest.mark.parametrize("after", [1, 3, 4])
def test_a_stopped_job_resumes_to_the_same_bits(tiny_base: Base, tmp_path: Path, offload: str, after: int) -> None:
    spec = full(offload=offload, gradient_checkpointing=offload == "all")
    whole = points(tiny_base, spec, tmp_path / "whole", valid=3)
    running = start(tiny_base, spec, tmp_path / "stopped", valid=3)
    for _ in range(after):
        next(running)
    running.close()
    rest = points(tiny_base, spec, tmp_path / "stopped", valid=3)
    assert rest == whole[after - after % 2 :]
    # A checkpoint's name has the hash of its content: weights, both moments, and the job's progress.
    names = [sorted(file.name for file in (tmp_path / job).iterdir()) for job in ("whole", "stopped")]
    assert names[0] == names[1]


def test_a_paused_job_keeps_its_last_step(tiny_base: Base, tmp_path: Path) -> None:
    spec = full(checkpoint_every=6, micro_tokens=16)
    whole = points(tiny_base, spec, tmp_path / "whole")
    calls = 0

    def check() -> None:
        nonlocal calls
        calls += 1
        if calls == 18:
            raise JobPaused("requested")

    with pytest.raises(JobPaused):
        points(tiny_base, spec, tmp_path / "paused", raise_if_stopped=check)
    rest = points(tiny_base, spec, tmp_path / "paused")
    assert 1 <= len(rest) < 6 and rest == whole[-len(rest) :]


def test_the_process_is_unchanged_afterwards(tiny_base: Base, tmp_path: Path) -> None:
    lora = spec_of(dropout=0.2)
    before = train_and_export(tiny_model(), lora, tmp_path / "before")
    environment, drawn, linear = dict(os.environ), torch.random.get_rng_state(), torch.nn.functional.linear
    with pytest.raises(TrainingDiverged, match="lower learning rate"):
        points(tiny_base, full(learning_rate=1e38), tmp_path / "job")
    running = start(tiny_base, full(offload="all"), tmp_path / "left")
    next(running)
    assert torch.distributed.is_initialized()
    running.close()
    assert not torch.distributed.is_initialized()
    assert dict(os.environ) == environment and torch.equal(torch.random.get_rng_state(), drawn)
    assert torch.nn.functional.linear is linear
    assert train_and_export(tiny_model(), lora, tmp_path / "after") == before


def test_starts_from_an_adapter(tiny_base: Base, tmp_path: Path) -> None:
    spec = spec_of(rank=8, learning_rate=3e-2, base=tiny_base.fingerprint)
    first = write_files(
        tmp_path / "first", train_and_export(load_for_training(tiny_base, torch.bfloat16), spec, tmp_path / "job")
    )
    still = full(steps=1, learning_rate=1e-12)
    (fresh,) = points(tiny_base, still, tmp_path / "fresh", valid=9)
    (point,) = points(tiny_base, still, tmp_path / "next", valid=9, start_from=first)
    plain = PeftModel.from_pretrained(load_for_training(tiny_base, torch.float32), first)
    expected = reference_loss(plain, random_examples(9, seed=1))[0].item()
    assert point.valid_loss == pytest.approx(expected, rel=2e-3)
    assert fresh.valid_loss != pytest.approx(expected, rel=1e-2)


def test_a_job_continues_the_extracted_lora(tiny_base: Base, tmp_path: Path) -> None:
    spec = full(steps=2, alpha=20.0, rslora=True, rank_pattern={"q_proj": 4}, alpha_pattern={"q_proj": 9.0})
    points(tiny_base, spec, tmp_path / "job")
    found = exported(tiny_base, spec, tmp_path / "job", tmp_path / "whole")
    first = write_files(tmp_path / "first", found.adapter_files)

    request = JobRequest(AdapterName("acme", "bot"), "t", options=LoramillOptions(start_from="champion", steps=1))
    again = resolve_spec(request, tiny_base, 23, "v", spec).model_copy(update={"learning_rate": 1e-12})
    model, held_out = load_for_training(tiny_base, torch.bfloat16), random_examples(9, seed=1)
    [point] = train(model, random_examples(23), held_out, again, checkpoints=tmp_path / "next", start_from=first)
    plain = PeftModel.from_pretrained(load_for_training(tiny_base, torch.float32), first)
    assert point.valid_loss == pytest.approx(reference_loss(plain, held_out)[0].item(), rel=2e-3)


@pytest.mark.parametrize("quantization", ["none", "int8", "nf4"])
def test_the_result_is_a_lora_and_a_base(tiny_base_folder: Path, tmp_path: Path, quantization: Quantization) -> None:
    """The LoRA applies to the base as it is served; the full weights are those that were trained, and are served."""
    base = base_of(tiny_base_folder, tmp_path, quantization)
    spec = full(rank=64, targets=("all-linear",), steps=2, batch_size=3)
    points(base, spec, tmp_path / "job")
    found = exported(base, spec, tmp_path / "job", tmp_path / "whole")
    last = checkpoint.latest(tmp_path / "job", spec)
    assert last is not None

    assert found.report.error < 1e-4  # 64 is every linear's full rank: only norms and embedding are left out
    assert set(found.report.changes_left_out) == {name for name in last.weights if "norm" in name or "embed" in name}
    assert found.report == type(found.report).model_validate_json(found.adapter_files[REPORT_FILE])
    served = load_for_training(base, torch.bfloat16).float()
    adapted = PeftModel.from_pretrained(served, write_files(tmp_path / "lora", found.adapter_files)).merge_and_unload()
    for name, parameter in adapted.named_parameters():
        if name not in found.report.changes_left_out:
            torch.testing.assert_close(parameter, last.weights[name], rtol=1e-3, atol=1e-5)

    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert whole.dtype == torch.bfloat16 and {file.parent for file in found.model_files.values()} == {
        tmp_path / "whole"
    }
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, last.weights[name].bfloat16()), name
    as_base = find_base(str(tmp_path / "whole"), tmp_path / "cache")
    assert as_base.fingerprint != base.fingerprint and as_base.context_length == base.context_length
    with OfflineEngine(as_base, Path, ServeSettings()) as engine:
        request = TextRequest("1", "acme", prompt="hello", sampling_params=SamplingParams(max_tokens=1, logprobs=0))
        (answer,) = engine.generate([request])
    prompt = torch.tensor([Tokenizer.from_file(str(tmp_path / "whole" / "tokenizer.json")).encode("hello").ids])
    likeliest = whole.float()(prompt).logits[0, -1].log_softmax(-1).max().item()
    assert answer.error is None and answer.logprobs[0].token.logprob == pytest.approx(likeliest, abs=0.15)


def test_an_unfinished_job_has_no_result(tiny_base: Base, tmp_path: Path) -> None:
    running = start(tiny_base, full(), tmp_path / "job")
    for _ in range(3):
        next(running)
    running.close()
    with pytest.raises(ArtifactMissing):
        exported(tiny_base, full(), tmp_path / "job", tmp_path / "whole")


TOGETHER = """
import sys
from pathlib import Path
import torch.distributed as dist
from loramill.errors import JobPaused
from loramill.jobs.train.distributed import ProcessGroup
from tests.jobs.train.test_full_finetune import SHARED, base_of, points
rank, root, calls = int(sys.argv[1]), Path(sys.argv[2]), 0
dist.init_process_group("gloo", init_method=f"file://{root}/meet", rank=rank, world_size=2)
def check():
    global calls
    calls += 1
    if rank == 0 and calls == 9:
        raise JobPaused("requested")
base = base_of(root / "base", root)
for stop in (check, lambda: None):
    try:
        group = ProcessGroup(rank, 2, dist.all_reduce)
        points(base, SHARED, root / "job", valid=3, raise_if_stopped=stop, process_group=group)
    except JobPaused:
        print("paused")
assert dist.is_initialized()
dist.destroy_process_group()
"""
SHARED = full(offload="all", micro_tokens=16, checkpoint_every=6)


def test_two_processes_share_a_job_across_a_pause(tiny_base_folder: Path, tmp_path: Path) -> None:
    """Only one process gets the request to pause, in the middle of a step."""
    (tmp_path / "base").symlink_to(tiny_base_folder)
    both = [
        subprocess.Popen(
            [sys.executable, "-c", TOGETHER, str(rank), str(tmp_path)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[3],
        )
        for rank in range(2)
    ]
    assert [process.communicate(timeout=120)[0].count("paused") for process in both] == [1, 1]
    assert [process.returncode for process in both] == [0, 0]
    points(base_of(tiny_base_folder, tmp_path), SHARED, tmp_path / "alone", valid=3)
    ours, theirs = (checkpoint.latest(tmp_path / job, SHARED) for job in ("alone", "job"))
    assert ours is not None and theirs is not None and theirs.run_state.finished
    assert theirs.run_state.figures == pytest.approx(ours.run_state.figures, rel=2e-2)
    start = load_for_training(base_of(tiny_base_folder, tmp_path), torch.float32)
    for name, parameter in start.named_parameters():
        moved = (ours.weights[name] - parameter).norm()
        assert (ours.weights[name] - theirs.weights[name]).norm() < 0.15 * moved, name


def test_a_worker_publishes_both_results_without_a_resident_base(tiny_base_folder: Path, tmp_path: Path) -> None:
    base = base_of(tiny_base_folder, tmp_path)
    migrate(f"sqlite:///{tmp_path / 'record.db'}")
    registry = Registry.open(f"sqlite:///{tmp_path / 'record.db'}", (tmp_path / "artifacts").as_uri())
    worker = Worker(
        name="w1",
        registry=registry,
        base=base,
        model=lambda: pytest.fail("the resident base was requested"),
        device=CPU,
        tokenizer=ChatTokenizer.load(tiny_base_folder),
        checkpoints=tmp_path / "checkpoints",
        logs=tmp_path / "logs",
        settings=JobSettings(),
    )
    rows = "".join(json.dumps({"prompt": f"say {word}", "completion": word}) + "\n" for word in "abcdefghij").encode()
    data = registry.artifacts.put({"data.jsonl": rows})
    with registry.writing() as session:
        tenants.create(session, "acme")
        train = datasets.create(session, "acme", "rows.jsonl", data, len(rows), 10).id
        job = jobs.submit(session, full(base=base.fingerprint, train=train, steps=2), {}, executor="dedicated").id
    assert run_next_job(worker)
    with registry.reading() as session:
        done = jobs.get(session, job)
    assert done.status == "succeeded" and done.version is not None and done.result is not None, done.error_message
    assert (registry.artifacts.fetch(done.version) / REPORT_FILE).is_file()
    PeftModel.from_pretrained(load_for_training(base, torch.bfloat16), registry.artifacts.fetch(done.version))
    AutoModelForCausalLM.from_pretrained(registry.artifacts.fetch(done.result))
    assert registry.remove_unreferenced(older_than=-1) == 0
    registry.close()
