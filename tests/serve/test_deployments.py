"""Devices of engine replicas: Ray options, and the settings of the engine."""

import logging
from types import SimpleNamespace

import pytest
import torch

from loramill.errors import Unavailable
from loramill.serve.deployments import engine_options, with_fixed_device
from loramill.serve.replica import engine_deployment, replica
from loramill.serve.replica.replica import Replica, resolve_device
from loramill.settings import ServeSettings, Settings
from loramill.types import GpuInfo


@pytest.mark.parametrize(("device", "gpus", "resolved"), [("auto", 0, "cpu"), ("cpu", 0, "cpu"), ("cuda", 1, "cuda")])
def test_a_replica_uses_only_the_gpu_that_ray_assigned(device, gpus, resolved, monkeypatch):
    # A replica without a GPU from Ray sees all GPUs of its node.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    settings = ServeSettings(device=device, threads=3)
    options = engine_options(Settings(serve=settings))
    assert options["num_gpus"] == gpus
    assert options["runtime_env"]["env_vars"]["OMP_NUM_THREADS"] == "3"
    assert resolve_device(with_fixed_device(settings)) == resolved


@pytest.mark.parametrize(("fraction", "gpus"), [(None, 1), (0.5, 0.5), (1 / 3, 0.3333)])
def test_a_replica_takes_its_share_of_a_gpu(fraction, gpus):
    settings = ServeSettings(device="cuda", gpu_fraction=fraction, accelerator_type="L40S")
    options = engine_options(Settings(serve=settings))
    assert (options["num_gpus"], options["accelerator_type"]) == (gpus, "L40S")
    assert options["runtime_env"]["env_vars"]["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"


def test_a_replica_on_a_cpu_requests_nothing_of_a_gpu():
    options = engine_options(Settings(serve={"device": "cpu", "gpu_fraction": 0.5, "accelerator_type": "L40S"}))
    assert options["num_gpus"] == 0 and "accelerator_type" not in options
    assert "PYTORCH_CUDA_ALLOC_CONF" not in options["runtime_env"]["env_vars"]


@pytest.mark.parametrize("has_cuda", [True, False])
def test_without_ray_auto_is_the_device_that_torch_finds(has_cuda, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    assert resolve_device(ServeSettings()) == ("cuda" if has_cuda else "cpu")
    assert resolve_device(ServeSettings(device="cpu")) == "cpu"
    assert resolve_device(ServeSettings(device="cuda")) == "cuda"


def test_a_database_that_does_not_answer_delays_no_start(base, caplog):
    def reading():
        raise Unavailable("The database does not answer.")

    assert engine_deployment._expected_ranks(SimpleNamespace(reading=reading), base) == ()
    assert "default rank only: The database does not answer." in caplog.text


#: What an engine on a CPU has by default.
CPU_LIMITS = (32768, 2**30, 2**28, 16)


class Started(Exception):
    """Raised in place of starting the engine."""


@pytest.mark.parametrize(
    ("options", "device", "tokens"),
    [({"device": "cpu"}, "cpu", 128), ({"device": "cuda"}, "cuda", 2048)]
    + [({"device": device, "max_batch_tokens": 64}, device, 64) for device in ("cpu", "cuda")],
)
def test_the_device_decides_where_the_base_is_and_the_tokens_per_step(
    options, device, tokens, base, monkeypatch, caplog
):
    seen = {}

    def load(folder, **options):
        seen.update(options)

    def engine(model, source, config):
        seen["config"] = config
        raise Started

    monkeypatch.setattr(replica, "load_model", load)
    monkeypatch.setattr(replica, "Engine", engine)
    gpu = GpuInfo(name="NVIDIA L4", bytes=22 << 30, capability=(8, 9))
    monkeypatch.setattr(replica, "open_gpu", lambda share: seen.update(share=share) or gpu)
    monkeypatch.setattr(replica, "free_bytes", lambda share, device: 10 << 30)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with pytest.raises(Started), caplog.at_level(logging.INFO):
        Replica(base, lambda version: base.folder, ServeSettings(**options))
    config = seen["config"]
    where = "the CPU" if device == "cpu" else "NVIDIA L4 (22 GiB)"
    assert f"engine on {where}: KV cache of {config.kv_tokens:,} tokens" in caplog.text
    assert (seen["device"], config.max_batch_tokens) == (device, tokens)
    if device == "cpu":
        assert (config.kv_tokens, config.adapter_bytes, config.host_bytes, config.max_waiting) == CPU_LIMITS
        assert "share" not in seen
    else:
        assert (seen["share"], config.max_waiting) == (1.0, 256)
        assert config.kv_tokens > 100_000 and 2**30 <= config.adapter_bytes < 2 << 30
