"""Devices of engine replicas: Ray options, and the settings of the engine."""

import pytest
import torch

from loramill.serve.deployments import engine_options, with_fixed_device
from loramill.serve.replica import replica
from loramill.serve.replica.replica import Replica, resolve_device
from loramill.settings import ServeSettings, Settings


@pytest.mark.parametrize(("device", "gpus", "resolved"), [("auto", 0, "cpu"), ("cpu", 0, "cpu"), ("cuda", 1, "cuda")])
def test_a_replica_uses_only_the_gpu_that_ray_assigned(device, gpus, resolved, monkeypatch):
    # A replica without a GPU from Ray sees all GPUs of its node.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    settings = ServeSettings(device=device, threads=3)
    options = engine_options(Settings(serve=settings))
    assert options["num_gpus"] == gpus
    assert options["runtime_env"]["env_vars"]["OMP_NUM_THREADS"] == "3"
    assert resolve_device(with_fixed_device(settings)) == resolved


@pytest.mark.parametrize("has_cuda", [True, False])
def test_without_ray_auto_is_the_device_that_torch_finds(has_cuda, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    assert resolve_device(ServeSettings()) == ("cuda" if has_cuda else "cpu")
    assert resolve_device(ServeSettings(device="cpu")) == "cpu"
    assert resolve_device(ServeSettings(device="cuda")) == "cuda"


class Started(Exception):
    """Raised in place of starting the engine."""


@pytest.mark.parametrize(
    ("options", "device", "tokens"),
    [({"device": "cpu"}, "cpu", 128), ({"device": "cuda"}, "cuda", 2048)]
    + [({"device": device, "max_batch_tokens": 64}, device, 64) for device in ("cpu", "cuda")],
)
def test_the_device_decides_where_the_base_is_and_the_tokens_per_step(options, device, tokens, base, monkeypatch):
    seen = {}

    def load(folder, **options):
        seen.update(options)

    def engine(model, source, config):
        seen["tokens"] = config.max_batch_tokens
        raise Started

    monkeypatch.setattr(replica, "load_model", load)
    monkeypatch.setattr(replica, "Engine", engine)
    with pytest.raises(Started):
        Replica(base, lambda version: base.folder, ServeSettings(**options))
    assert (seen["device"], seen["tokens"]) == (device, tokens)
