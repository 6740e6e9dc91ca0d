"""How a training process selects its device."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from loramill.errors import SetupError
from loramill.gpus import CONTEXT_BYTES
from loramill.jobs.ray import train_worker
from loramill.registry import Registry, migrate, pool_gpus
from loramill.settings import JobSettings
from loramill.types import GpuInfo

CUDA = torch.device("cuda:0")


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, torch.device]]:
    """A machine with one GPU; yields the memory fractions that were set."""
    fractions: list[tuple[float, torch.device]] = []
    properties = SimpleNamespace(name="NVIDIA L4", total_memory=22 << 30, major=8, minor=9)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *args: fractions.append(args))
    return fractions


@pytest.mark.parametrize("use_gpu", ["auto", False])
def test_a_cpu_session_does_not_use_the_gpu(gpu, monkeypatch, use_gpu):
    # In a worker without a GPU Ray Train returns the CPU, which has no memory fraction to set.
    monkeypatch.setattr(train_worker, "get_device", lambda: torch.device("cpu"))
    assert train_worker.select_device(JobSettings(use_gpu=use_gpu)) == (torch.device("cpu"), None)
    assert gpu == []


@pytest.mark.parametrize(("options", "share"), [({"per_gpu": 4}, 0.25), ({"per_gpu": 2, "gpu_fraction": 0.5}, 0.25)])
def test_a_gpu_session_takes_its_share_of_the_memory(gpu, monkeypatch, options, share):
    monkeypatch.setattr(train_worker, "get_device", lambda: CUDA)
    device, info = train_worker.select_device(JobSettings(use_gpu=True, **options))
    assert (device, info) == (CUDA, GpuInfo(name="NVIDIA L4", bytes=22 << 30, capability=(8, 9)))
    assert gpu == [(share - CONTEXT_BYTES / (22 << 30), CUDA)]


def test_a_session_refuses_an_old_gpu(monkeypatch):
    old = SimpleNamespace(name="Tesla T4", total_memory=15 << 30, major=7, minor=5)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: old)
    monkeypatch.setattr(train_worker, "get_device", lambda: CUDA)
    with pytest.raises(SetupError, match="Tesla T4"):
        train_worker.select_device(JobSettings(use_gpu=True))


def test_a_gpu_session_without_a_gpu_trains_on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert train_worker.select_device(JobSettings(use_gpu=True)) == (torch.device("cpu"), None)


def test_only_a_gpu_session_turns_cudnn_attention_off(monkeypatch):
    changes = []
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", changes.append)
    train_worker.select_device(JobSettings())
    assert changes == []
    monkeypatch.setattr(train_worker, "get_device", lambda: torch.device("cuda:0"))
    train_worker.select_device(JobSettings(use_gpu=True))
    assert changes == [False]


def test_a_session_reports_its_gpu(tmp_path):
    url = f"sqlite:///{tmp_path}/loramill.db"
    migrate(url)
    registry = Registry.open(url, (tmp_path / "artifacts").as_uri())
    gpu = GpuInfo(name="NVIDIA L4", bytes=22 << 30, capability=(8, 9))
    train_worker.report_gpu(registry, None)
    train_worker.report_gpu(registry, gpu)
    with registry.reading() as session:
        assert pool_gpus.smallest(session, now=0.0) == gpu
    registry.close()
