"""How a session chooses its device."""

from __future__ import annotations

import pytest
import torch

from loramill.jobs.ray import session
from loramill.settings import JobSettings


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, torch.device]]:
    """A machine with one GPU, which Ray assigned or not; the memory fractions that were set."""
    fractions: list[tuple[float, torch.device]] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *args: fractions.append(args))
    return fractions


def test_a_session_of_the_cpu_leaves_the_gpu_alone(gpu, monkeypatch):
    # Ray Train's answer in a worker without a GPU is the CPU, which has no memory fraction to set.
    monkeypatch.setattr(session, "get_device", lambda: torch.device("cpu"))
    assert session.select_device(JobSettings()) == torch.device("cpu")
    assert gpu == []


def test_a_session_of_the_gpu_takes_its_share(gpu, monkeypatch):
    monkeypatch.setattr(session, "get_device", lambda: torch.device("cuda:0"))
    assert session.select_device(JobSettings(use_gpu=True, per_gpu=4)) == torch.device("cuda:0")
    assert gpu == [(0.25, torch.device("cuda:0"))]


def test_a_session_without_its_gpu_trains_on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert session.select_device(JobSettings(use_gpu=True)) == torch.device("cpu")
