"""Several processes that share the forward passes of each step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from loramill.errors import JobError, JobPaused, JobPreempted

#: What a process tells the others when it ends; there are fewer processes than the one is times the other.
_STOP_REQUESTED, _FAILED = 1.0, 1e6


def _no_all_reduce(tensor: torch.Tensor) -> None:
    """The sum over one process."""


@dataclass(frozen=True, slots=True)
class ProcessGroup:
    """This process among `size`, counted from 0; `all_reduce` makes a tensor the sum of all processes', in place."""

    rank: int
    size: int
    all_reduce: Callable[[torch.Tensor], None]

    @contextmanager
    def all_reduce_on_exit(self, sums: torch.Tensor) -> Iterator[None]:
        """Within, this process adds its part to `sums` (float64); afterwards they are of all processes.

        A process that can't go on says so to the others, which would wait for it for ever.

        Raises:
            JobPaused: another process was asked to stop, and may have to save what it has with this one.
            JobError: another process couldn't go on.
        """
        try:
            yield
        except (JobPaused, JobPreempted):
            self._exchange(sums, _STOP_REQUESTED)
            raise
        except Exception:
            self._exchange(sums, _FAILED)
            raise
        told = self._exchange(sums, 0.0)
        if told >= _FAILED:
            raise JobError(f"Another of this job's {self.size} processes stopped: see the job's error, or its log.")
        if told:
            raise JobPaused(f"Another of this job's {self.size} processes was asked to stop.")

    def _exchange(self, sums: torch.Tensor, signal: float) -> float:
        """Sums up; returns what the processes told, together."""
        if self.size == 1:
            return 0.0
        both = torch.cat([sums, sums.new_tensor([signal])])
        self.all_reduce(both)
        sums.copy_(both[:-1])
        return both[-1].item()

    def add_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Makes each gradient the sum of all processes'; a process without rows adds zeros."""
        if self.size == 1:
            return
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        self.all_reduce(flat)
        for parameter, part in zip(parameters, torch.split(flat, [g.numel() for g in gradients]), strict=True):
            parameter.grad = part.view_as(parameter)


#: A process by itself.
SINGLE_PROCESS = ProcessGroup(0, 1, _no_all_reduce)
