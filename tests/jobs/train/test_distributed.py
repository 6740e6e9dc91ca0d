"""Several processes share a step's passes; the result equals that of one process, to rounding."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from loramill.errors import JobError, JobPaused, LeaseLost, LoramillError, TrainingDiverged
from loramill.jobs.train.checkpoint import latest
from loramill.jobs.train.context import TrainingProgress
from loramill.jobs.train.distributed import ProcessGroup
from loramill.types import JobSpec

from .tiny_training import random_examples, random_judged, spec_of, tiny_model, train

HELD_OUT = random_examples(5, seed=1, weighed=True)


class Group:
    """Threads instead of processes; one runs at a time, since all threads share torch's generators."""

    def __init__(self, size: int) -> None:
        self._size, self._turn, self._arrived = size, threading.Lock(), threading.Barrier(size, timeout=60)
        self._tensors: list[torch.Tensor] = []

    def run(self, task: Callable[[ProcessGroup], Any]) -> list[Any]:
        """Runs `task` in each process; returns the results, or the errors."""
        results: list[Any] = [None] * self._size

        def work(rank: int) -> None:
            with self._turn:
                try:
                    results[rank] = task(ProcessGroup(rank, self._size, self._all_reduce))
                except LoramillError as error:
                    results[rank] = error

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(self._size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results

    def _all_reduce(self, tensor: torch.Tensor) -> None:
        self._tensors.append(tensor.clone())
        self._meet()
        total = torch.stack(self._tensors).sum(0)
        self._meet()
        self._tensors = []
        tensor.copy_(total)
        self._meet()

    def _meet(self) -> None:
        self._turn.release()
        self._arrived.wait()
        self._turn.acquire()


def points(spec: JobSpec, checkpoints: Path, processes: ProcessGroup, **more: Any) -> list[TrainingProgress]:
    preferences = spec.objective != "sft"
    return list(
        train(
            tiny_model(),
            random_judged(spec.objective, 23) if preferences else random_examples(23, weighed=True),
            random_judged(spec.objective, 5, 1) if preferences else HELD_OUT,
            spec,
            checkpoints=checkpoints,
            process_group=processes,
            **more,
        )
    )


@pytest.mark.parametrize(
    ("size", "changes"),
    [
        (2, {}),
        (3, {"micro_tokens": 20}),
        (4, {"batch_size": 2, "packing": False}),
        (4, {"epochs": 2, "steps": 6, "batch_size": 11}),  # of 23 examples the third step has one
        (2, {"objective": "dpo", "learning_rate": 5e-3}),
        (3, {"objective": "kto", "micro_tokens": 20}),
    ],
)
@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_several_processes_give_the_result_of_one(
    tmp_path: Path, size: int, changes: dict[str, Any], method: str
) -> None:
    """Also where a process has nothing to do, as with two examples for four."""
    spec = spec_of(method=method, **changes)
    alone = points(spec, tmp_path / "alone", ProcessGroup(0, 1, lambda _: None))
    ranks = Group(size).run(lambda processes: points(spec, tmp_path / str(processes.rank), processes))
    assert all(rank == ranks[0] for rank in ranks)
    for ours, theirs in zip(ranks[0], alone, strict=True):
        assert (ours.step, ours.trained_tokens, ours.is_best) == (theirs.step, theirs.trained_tokens, theirs.is_best)
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)
        assert ours.accuracy == pytest.approx(theirs.accuracy, abs=1e-6)
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-4)
        assert ours.valid_loss == (None if theirs.valid_loss is None else pytest.approx(theirs.valid_loss, rel=1e-5))
    assert latest(tmp_path / "0", spec) is not None
    assert not any((tmp_path / str(rank)).exists() for rank in range(1, size))  # only the first one writes


def test_all_processes_resume_from_the_first_ones_checkpoint(tmp_path: Path) -> None:
    spec = spec_of(dropout=0.3)
    uninterrupted = Group(2).run(lambda processes: points(spec, tmp_path / "whole", processes))

    def half(processes: ProcessGroup) -> list[TrainingProgress]:
        running = train(
            tiny_model(),
            random_examples(23, weighed=True),
            HELD_OUT,
            spec,
            checkpoints=tmp_path / "job",
            process_group=processes,
        )
        return [next(running) for _ in range(3)]

    stopped = Group(2).run(half)
    rest = Group(2).run(lambda processes: points(spec, tmp_path / "job", processes))
    assert stopped[0] + rest[0][1:] == uninterrupted[0]
    assert rest[0] == rest[1]


@pytest.mark.parametrize(
    ("own", "others", "message"),
    [
        (JobPaused("now"), JobPaused, "Another of this job's 3 processes was requested to stop"),
        (LeaseLost("gone"), JobError, "Another of this job's 3 processes stopped"),
    ],
)
def test_a_process_that_stops_stops_the_others(
    tmp_path: Path, own: JobError, others: type[JobError], message: str
) -> None:
    def stop(processes: ProcessGroup) -> list[TrainingProgress]:
        passes = iter(range(4))

        def check() -> None:
            if processes.rank == 1 and next(passes, None) is None:
                raise own

        return points(spec_of(checkpoint_every=50), tmp_path, processes, raise_if_stopped=check)

    first, second, third = Group(3).run(stop)
    assert second is own
    assert type(first) is type(third) is others
    assert message in str(first)
    assert (latest(tmp_path, spec_of(checkpoint_every=50)) is not None) == (others is JobPaused)


def test_all_processes_report_divergence(tmp_path: Path) -> None:
    spec = spec_of(learning_rate=1e38)
    errors = Group(2).run(lambda processes: points(spec, tmp_path, processes))
    assert [type(error) for error in errors] == [TrainingDiverged, TrainingDiverged]
    assert str(errors[0]).partition(" The last")[0] == str(errors[1]).partition(" The last")[0]
