"""Several processes that share the forward passes of each step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from loramill.errors import JobError, JobPaused, JobPreempted

#: What a process adds to a sum when it ends. There are fewer processes than the ratio of the two, so that the sum shows
#: whether any failed.
_STOP_REQUESTED, _FAILED = 1.0, 1e6


def _no_all_reduce(tensor: torch.Tensor) -> None:
    """The sum over one process."""


@dataclass(frozen=True, slots=True)
class ProcessGroup:
    """The processes of a job, as one of them sees them.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes.
        all_reduce: replaces a tensor by its sum over all processes, in place.
    """

    rank: int
    size: int
    all_reduce: Callable[[torch.Tensor], None]

    @contextmanager
    def all_reduce_on_exit(self, sums: torch.Tensor) -> Iterator[None]:
        """Within, this process adds its part to `sums` (float64); on exit `sums` are those of all processes.

        If the body raises, the exchange still takes place and signals it: the other processes would otherwise wait
        forever.

        Raises:
            JobPaused: another process was requested to stop; it may need this process to save its state.
            JobError: another process failed.
        """
        try:
            yield
        except (JobPaused, JobPreempted):
            self._exchange(sums, _STOP_REQUESTED)
            raise
        except Exception:
            self._exchange(sums, _FAILED)
            raise
        signals = self._exchange(sums, 0.0)
        if signals >= _FAILED:
            raise JobError(f"Another of this job's {self.size} processes stopped: see the job's error, or its log.")
        if signals:
            raise JobPaused(f"Another of this job's {self.size} processes was requested to stop.")

    def _exchange(self, sums: torch.Tensor, signal: float) -> float:
        """Sums up `sums`, and returns the sum of the signals."""
        if self.size == 1:
            return 0.0
        both = torch.cat([sums, sums.new_tensor([signal])])
        self.all_reduce(both)
        sums.copy_(both[:-1])
        return both[-1].item()

    def add_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Replaces each gradient by its sum over all processes; a process without rows adds zeros."""
        if self.size == 1:
            return
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        self.all_reduce(flat)
        for parameter, part in zip(parameters, torch.split(flat, [g.numel() for g in gradients]), strict=True):
            parameter.grad = part.view_as(parameter)


SINGLE_PROCESS = ProcessGroup(0, 1, _no_all_reduce)


def connect_processes(device: torch.device) -> ProcessGroup:
    """Returns the processes of the initialized `torch.distributed`, which sum over Gloo or, on GPUs, over NCCL."""
    if device.type == "cuda":
        _reconnect("cpu:gloo,cuda:nccl")
    size = dist.get_world_size()
    return ProcessGroup(dist.get_rank(), size, dist.all_reduce) if size > 1 else SINGLE_PROCESS


def _reconnect(backend: str) -> None:
    """Connects the same processes by another backend.

    Ray Train takes a backend where the supervisor runs, and that machine may have no GPU.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    store = dist.distributed_c10d.PrefixStore(backend, dist.distributed_c10d._get_default_store())
    dist.destroy_process_group()
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
