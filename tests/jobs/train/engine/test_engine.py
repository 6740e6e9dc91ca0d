"""Adapters that train together get the weights that each gets alone, whatever the others are and do."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from loramill.data.encoding import EncodedExample, TrainingExample
from loramill.errors import JobPaused, OutOfMemory, TrainingDiverged
from loramill.jobs.train.context import TrainingProgress
from loramill.jobs.train.engine import Driver, TrainingEngine, Work
from loramill.jobs.train.engine import engine as engine_module
from loramill.jobs.train.export.adapter import export_adapter
from loramill.jobs.train.forward import configured_forward, translate_oom
from loramill.jobs.train.loop import TrainingRun
from loramill.jobs.train.methods import attach_adapter
from loramill.types import JobSpec

from ....llama import tiny_llama
from ..tiny_training import NOWHERE, context_of, random_examples, random_judged, spec_of, train_and_export

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True)
class Job:
    """A job that joins before pass `joins`, and leaves after step `leaves`."""

    spec: JobSpec
    examples: Sequence[TrainingExample]
    valid: Sequence[TrainingExample] = ()
    joins: int = 0
    leaves: int | None = None


def work_of(model: PreTrainedModel, job: Job, folder: Path, **fields: Any) -> Work[list[TrainingProgress]]:
    """All steps of a job, from its last checkpoint."""
    context, points = context_of(job.examples, job.valid, job.spec, checkpoints=folder, **fields), []
    with translate_oom(256, 20), attach_adapter(model, job.spec, NOWHERE) as adapted:
        run = TrainingRun(model, adapted, context)
        run.resume()
        while not run.state.finished and run.state.step != job.leaves:
            points.append((yield from run.advance()))
    return points


@contextmanager
def driver_of(model: PreTrainedModel, pass_tokens: int = 1000) -> Iterator[Driver[list[TrainingProgress]]]:
    with configured_forward(model, 500):
        yield Driver(TrainingEngine(model), pass_tokens)


def train_together(
    model: PreTrainedModel, jobs: Sequence[Job], folder: Path, pass_tokens: int = 1000
) -> dict[str, Exception | list[TrainingProgress]]:
    """Trains the jobs by shared passes, each in the folder of its number; returns their progress or errors."""
    outcomes: dict[str, Any] = {}
    with driver_of(model, pass_tokens) as driver:
        passes, waiting = 0, dict(enumerate(jobs))
        while len(outcomes) < len(jobs):
            for number, job in list(waiting.items()):
                if job.joins <= passes:
                    del waiting[number]
                    driver.start(str(number), job.spec.adapter, work_of(model, job, folder / str(number)))
            outcomes |= {ended.name: ended.error or ended.value for ended in driver.run_pass(0)}
            passes += 1
    return outcomes


def files(folder: Path, job: Job) -> bytes:
    return export_adapter(folder, job.spec, base="tiny", best=False)["adapter_model.safetensors"]


def files_alone(model: PreTrainedModel, job: Job, folder: Path) -> bytes:
    made = train_and_export(model, job.spec, folder, train=job.examples, valid=job.valid)
    return made["adapter_model.safetensors"]


METHODS: list[dict[str, Any]] = [
    {},
    {"rslora": True, "rank": 8},
    {"loraplus_lr_ratio": 4.0, "dropout": 0.3},
    {"method": "dora", "dropout": 0.2},
    {"method": "adalora", "rank": 2, "init_rank": 4},
    {"method": "pissa"},
    {"targets": ("q_proj", "lm_head"), "rank": 3},
    {"targets": ("down_proj",), "rank_pattern": {"0.mlp.down_proj": 7}, "layers": (0,)},
    {"gradient_checkpointing": True, "dropout": 0.1},
    {"packing": False, "micro_tokens": 40},
    {"objective": "dpo", "dropout": 0.2},
    {"objective": "orpo", "method": "dora"},
    {"objective": "kto", "micro_tokens": 60},
]


@st.composite
def mixes(draw: st.DrawFn) -> list[Job]:
    jobs = []
    for number in range(draw(st.integers(2, 4))):
        changes = draw(st.sampled_from(METHODS)) | {
            "adapter": f"{draw(st.sampled_from(['acme', 'umbra']))}/a{number}",
            "batch_size": draw(st.integers(1, 6)),
            "steps": draw(st.integers(2, 6)),
            "seed": draw(st.integers(0, 99)),
            "learning_rate": draw(st.sampled_from([1e-3, 1e-2, 5e-2])),
            "schedule": draw(st.sampled_from(["linear", "cosine", "constant"])),
            "epochs": draw(st.sampled_from([None, 1])),
        }
        count, weighed, valid = draw(st.integers(1, 12)), draw(st.booleans()), draw(st.booleans())
        if objective := changes.get("objective"):
            examples, held_out = random_judged(objective, count, number), random_judged(objective, 3, 7)
        else:
            examples, held_out = random_examples(count, number, weighed=weighed), random_examples(3, seed=7)
        jobs.append(Job(spec_of(**changes), examples, held_out if valid else (), joins=draw(st.integers(0, 5))))
    return jobs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(jobs=mixes(), pass_tokens=st.sampled_from([30, 100, 1000]))
def test_together_or_alone_the_weights_are_the_same_to_the_bit(
    dtype: torch.dtype, jobs: list[Job], pass_tokens: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder, model = tmp_path_factory.mktemp("jobs"), tiny_llama(dtype, seed=2, vocab_size=64, tie_word_embeddings=False)
    model.requires_grad_(False)
    outcomes = train_together(model, jobs, folder, pass_tokens)
    assert not [each for each in outcomes.values() if isinstance(each, Exception)]
    for number, job in enumerate(jobs):
        assert files(folder / str(number), job) == files_alone(model, job, folder / f"{number} alone")
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny_llama(torch.float32, seed=2, vocab_size=64, tie_word_embeddings=False).requires_grad_(False)


def job(number: int, **changes: Any) -> Job:
    return Job(spec_of(adapter=f"acme/a{number}", seed=number, **changes), random_examples(9, seed=number))


def test_one_pass_has_parts_of_all_adapters(model: PreTrainedModel, tmp_path: Path) -> None:
    jobs, sizes = [job(number, steps=3) for number in range(4)], []
    model.model.layers[0].register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].shape[1]))
    train_together(model, jobs, tmp_path)
    together = list(sizes)
    sizes.clear()
    for number, each in enumerate(jobs):
        files_alone(model, each, tmp_path / f"{number} alone")
    assert len(together) == 3 and len(sizes) == 12 and sum(together) == sum(sizes)


def test_a_job_that_diverges_fails_alone(model: PreTrainedModel, tmp_path: Path) -> None:
    jobs = [job(0), job(1, learning_rate=1e30, max_grad_norm=1e30, schedule="constant"), job(2, method="dora")]
    outcomes = train_together(model, jobs, tmp_path)
    assert isinstance(outcomes["1"], TrainingDiverged)
    for number in (0, 2):
        assert files(tmp_path / str(number), jobs[number]) == files_alone(model, jobs[number], tmp_path / f"{number}a")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_nan_in_one_adapter_reaches_no_other(model: PreTrainedModel, tmp_path: Path, bad: float) -> None:
    jobs = [job(0, steps=4), job(1, steps=4), job(2, steps=4, method="dora")]

    def poisoned(number: int) -> Work[Any]:
        with attach_adapter(model, jobs[number].spec, NOWHERE) as adapted:
            context = context_of(jobs[number].examples, (), jobs[number].spec, checkpoints=tmp_path / str(number))
            run = TrainingRun(model, adapted, context)
            run.resume()
            while not run.state.finished:
                if number == 1 and run.state.step == 2:
                    next(iter(adapted.weights.values())).data[0, 0] = bad
                    adapted.after_step(2)
                yield from run.advance()

    errors = {}
    with driver_of(model) as driver:
        for number in range(3):
            driver.start(str(number), "acme", poisoned(number))
        while len(driver):
            errors |= {ended.name: ended.error for ended in driver.run_pass(0)}
    assert isinstance(errors["1"], TrainingDiverged) and errors["0"] is errors["2"] is None
    for number in (0, 2):
        assert files(tmp_path / str(number), jobs[number]) == files_alone(model, jobs[number], tmp_path / f"{number}a")


def test_memory_that_runs_out_shrinks_the_pass_and_not_the_session(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs, passes = [job(number, steps=3) for number in range(4)], []
    own = engine_module.torch.autograd.grad

    def scarce(losses: list[torch.Tensor], weights: list[torch.Tensor], **more: Any) -> Any:
        passes.append(len(losses))
        if len(losses) > 2:
            own(losses, weights[:3], retain_graph=True, **more)
            raise MemoryError
        return own(losses, weights, **more)

    monkeypatch.setattr(torch.autograd, "grad", scarce)
    outcomes = train_together(model, jobs, tmp_path)
    assert not [each for each in outcomes.values() if isinstance(each, Exception)]
    assert passes[0] == 4 and max(passes[1:]) <= 2
    for number, each in enumerate(jobs):
        assert files(tmp_path / str(number), each) == files_alone(model, each, tmp_path / f"{number} alone")


def test_a_job_without_memory_for_itself_fails_alone(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [job(0), replace(job(1), examples=[EncodedExample((5,) * 200, 40)])]
    own = engine_module.predict

    def scarce(called: Any, base: Any, parts: Sequence[Any]) -> Any:
        if any(part.tokens.shape[1] >= 150 for part in parts):
            raise MemoryError
        return own(called, base, parts)

    monkeypatch.setattr(engine_module, "predict", scarce)
    outcomes = train_together(model, jobs, tmp_path)
    assert isinstance(outcomes["1"], OutOfMemory)
    monkeypatch.undo()
    assert files(tmp_path / "0", jobs[0]) == files_alone(model, jobs[0], tmp_path / "alone")


def test_a_pass_without_memory_keeps_none_from_the_next(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [replace(job(0), examples=[EncodedExample((5,) * 200, 40)]), job(1)]
    own, failed = engine_module.predict, list[weakref.ref[Any]]()

    def scarce(called: Any, base: Any, parts: Sequence[Any]) -> Any:
        predictions = own(called, base, parts)
        if any(part.tokens.shape[1] >= 150 for part in parts) or any(each() is not None for each in failed):
            failed.append(weakref.ref(predictions[0].states))
            raise MemoryError
        return predictions

    monkeypatch.setattr(engine_module, "predict", scarce)
    outcomes = train_together(model, jobs, tmp_path)
    assert isinstance(outcomes["0"], OutOfMemory) and len(failed) == 2
    assert len(outcomes["1"]) == jobs[1].spec.steps  # type: ignore[arg-type]


def test_a_job_that_should_stop_waits_for_no_further_pass(model: PreTrainedModel, tmp_path: Path) -> None:
    jobs, stopped = [job(number) for number in range(3)], list[JobPaused]()

    def raise_if_stopped() -> None:
        for error in stopped:
            raise error

    with driver_of(model, pass_tokens=1) as driver:
        for number, each in enumerate(jobs):
            fields = {"raise_if_stopped": raise_if_stopped} if number == 2 else {}
            driver.start(str(number), "acme", work_of(model, each, tmp_path / str(number), **fields))
        while not (tmp_path / "2").exists():
            assert not driver.run_pass(0)
        driver.run_pass(0)
        stopped.append(JobPaused("paused"))
        assert [(each.name, each.error) for each in driver.run_pass(0)] == [("2", stopped[0])]
        driver.close()
    train_together(model, jobs, tmp_path)
    assert files(tmp_path / "2", jobs[2]) == files_alone(model, jobs[2], tmp_path / "alone")


def test_a_job_that_leaves_resumes_to_the_same_bits(model: PreTrainedModel, tmp_path: Path) -> None:
    first = job(0, steps=6, dropout=0.2)
    train_together(model, [replace(first, leaves=4), job(1), job(2)], tmp_path)
    outcomes = train_together(model, [first, job(3)], tmp_path)
    assert len(outcomes["0"]) == 2  # type: ignore[arg-type]
    assert files(tmp_path / "0", first) == files_alone(model, first, tmp_path / "alone")
