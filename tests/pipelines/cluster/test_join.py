"""What `loramill join` requires of the settings of a cluster with GPUs."""

from __future__ import annotations

import logging

import pytest

from loramill.errors import SettingsInvalid
from loramill.pipelines.cluster.join import check_devices
from loramill.settings import Settings

DECIDED = {"serve": {"device": "cuda"}, "jobs": {"use_gpu": True}}


@pytest.mark.parametrize(
    ("left_out", "named", "other"),
    [
        ("serve", "LORAMILL_SERVE__DEVICE", "LORAMILL_JOBS__USE_GPU"),
        ("jobs", "LORAMILL_JOBS__USE_GPU", "LORAMILL_SERVE__DEVICE"),
    ],
)
def test_a_cluster_with_gpus_needs_decided_devices(left_out: str, named: str, other: str) -> None:
    check_devices(Settings.model_validate(DECIDED), 4.0)
    with pytest.raises(SettingsInvalid, match=f"has 4 GPUs.*{named}") as refused:
        check_devices(Settings.model_validate({**DECIDED, left_out: {}}), 4.0)
    assert other not in refused.value.message


def test_a_cluster_without_gpus_uses_its_cpus_and_logs_it(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "loramill.cluster"):
        check_devices(Settings(), 0.0)
    assert "LORAMILL_SERVE__DEVICE" in caplog.text and "LORAMILL_JOBS__USE_GPU" in caplog.text
