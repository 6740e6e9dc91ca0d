"""The GPU of a process: its check, and its share of the memory."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from loramill.errors import SetupError
from loramill.gpus import CONTEXT_BYTES, memory_fraction
from loramill.gpus.process import free_bytes, open_gpu

DEVICE = torch.device("cuda", 0)


@pytest.fixture
def fractions(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, torch.device]]:
    """A machine with an L4; yields the memory fractions that are set."""
    set_fractions: list[tuple[float, torch.device]] = []
    properties = SimpleNamespace(name="NVIDIA L4", total_memory=22 << 30, major=8, minor=9)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *args: set_fractions.append(args))
    return set_fractions


def test_a_share_of_the_memory_is_limited(fractions: list[tuple[float, torch.device]]) -> None:
    gpu = open_gpu(0.25)
    assert str(gpu) == "NVIDIA L4 (22 GiB)" and gpu.capability == (8, 9)
    assert fractions == [(0.25 - CONTEXT_BYTES / (22 << 30), DEVICE)]


def test_the_only_user_of_a_gpu_is_not_limited(fractions: list[tuple[float, torch.device]]) -> None:
    open_gpu(1.0, DEVICE)
    assert fractions == []


def test_a_process_that_opens_a_gpu_does_not_use_cudnns_attention(
    fractions: list[tuple[float, torch.device]], monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: list[bool] = []
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", changes.append)
    open_gpu(1.0)
    assert changes == [False]


@pytest.mark.parametrize("count", [1, 2, 4, 16])
def test_the_processes_of_a_gpu_fit_with_their_contexts(count: int) -> None:
    total = 24 << 30
    used = count * (memory_fraction(1 / count, total) * total + CONTEXT_BYTES)
    assert used <= total * 1.000001


def test_an_old_or_missing_gpu_is_refused(
    fractions: list[tuple[float, torch.device]], monkeypatch: pytest.MonkeyPatch
) -> None:
    old = SimpleNamespace(name="Tesla T4", total_memory=15 << 30, major=7, minor=5)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: old)
    with pytest.raises(SetupError, match=r"Tesla T4 has compute capability 7\.5"):
        open_gpu(1.0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SetupError, match="doctor"):
        open_gpu(1.0)


@pytest.mark.parametrize(
    ("share", "device_free", "expected"),
    [
        (0.5, 20 << 30, (12 << 30) - CONTEXT_BYTES - (5 << 30) + (1 << 30)),
        (0.5, 2 << 30, 3 << 30),
        (1.0, 18 << 30, 19 << 30),
    ],
)
def test_free_memory_is_that_of_the_share_and_of_the_device(
    monkeypatch: pytest.MonkeyPatch, share: float, device_free: int, expected: int
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (device_free, 24 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 5 << 30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 4 << 30)
    assert free_bytes(share, DEVICE) == pytest.approx(expected, abs=10)
