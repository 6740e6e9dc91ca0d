"""How a training process selects its device."""

from __future__ import annotations

import pytest
import torch

from loramill.jobs.ray import train_worker
from loramill.settings import JobSettings


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, torch.device]]:
    """A machine with one GPU; yields the memory fractions that were set."""
    fractions: list[tuple[float, torch.device]] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *args: fractions.append(args))
    return fractions


def test_a_cpu_session_does_not_use_the_gpu(gpu, monkeypatch):
    # In a worker without a GPU Ray Train returns the CPU, which has no memory fraction to set.
    monkeypatch.setattr(train_worker, "get_device", lambda: torch.device("cpu"))
    assert train_worker.select_device(JobSettings()) == torch.device("cpu")
    assert gpu == []


def test_a_gpu_session_takes_its_share_of_the_memory(gpu, monkeypatch):
    monkeypatch.setattr(train_worker, "get_device", lambda: torch.device("cuda:0"))
    assert train_worker.select_device(JobSettings(use_gpu=True, per_gpu=4)) == torch.device("cuda:0")
    assert gpu == [(0.25, torch.device("cuda:0"))]


def test_a_gpu_session_without_a_gpu_trains_on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert train_worker.select_device(JobSettings(use_gpu=True)) == torch.device("cpu")


def test_only_a_gpu_session_turns_cudnn_attention_off(monkeypatch):
    changes = []
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", changes.append)
    train_worker.select_device(JobSettings())
    assert changes == []
    monkeypatch.setattr(train_worker, "get_device", lambda: torch.device("cuda:0"))
    train_worker.select_device(JobSettings(use_gpu=True))
    assert changes == [False]
