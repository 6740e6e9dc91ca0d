"""What `loramill up` checks on its Ray cluster before anything is deployed."""

from __future__ import annotations

import pytest

from loramill.errors import SetupError
from loramill.gpus.machine import Gpu
from loramill.pipelines.cluster import deploy
from loramill.settings import Settings

H100 = Gpu(name="NVIDIA H100", bytes=79 << 30, capability=(9, 0), free_bytes=79 << 30, driver="580.82.07")


@pytest.mark.parametrize("options", [{"serve": {"device": "cuda"}}, {"jobs": {"use_gpu": True}}], ids=["serve", "jobs"])
def test_gpus_that_ray_does_not_find_end_the_start(
    options: dict[str, dict[str, object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deploy, "list_gpus", lambda: (H100, H100))
    settings = Settings.model_validate(options)
    for found in ({}, {"GPU": 1.0}):
        monkeypatch.setattr(deploy.ray, "cluster_resources", lambda found=found: found)
        with pytest.raises(SetupError, match=f"nvidia-smi reports 2 GPUs, and Ray finds {len(found)}"):
            deploy.check_ray_gpus(settings)
        deploy.check_ray_gpus(Settings(serve={"device": "cpu"}, jobs={"use_gpu": False}))
    monkeypatch.setattr(deploy.ray, "cluster_resources", lambda: {"GPU": 2.0})
    deploy.check_ray_gpus(settings)
