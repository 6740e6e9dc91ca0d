"""Errors of a device."""

from __future__ import annotations

import pytest
import torch

from loramill.kernels.device import device_works, free_cached_memory, is_out_of_memory

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (torch.AcceleratorError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("out of memory"), False),
    ],
)
def test_out_of_memory_is_recognized(error, expected):
    assert is_out_of_memory(error) is expected


def test_a_device_works_if_it_synchronizes(monkeypatch):
    synchronized = []
    monkeypatch.setattr(torch.cuda, "synchronize", synchronized.append)
    assert device_works(CUDA) and device_works(CPU) and synchronized == [CUDA]

    def broken(device):
        raise torch.AcceleratorError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    assert not device_works(CUDA) and device_works(CPU)


def test_the_cache_is_emptied_on_a_gpu_alone(monkeypatch):
    emptied = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    free_cached_memory(CPU)
    assert emptied == []
    free_cached_memory(CUDA)
    assert emptied == [True]
