"""The GPUs that the driver reports, and which of them torch can use."""

from __future__ import annotations

import ctypes
import stat
from pathlib import Path

import pytest

from loramill.gpus import ray_share
from loramill.gpus.machine import Gpu, driver_problem, gpu_problem, list_gpus, parse_gpus, torch_cuda_version

REPORT = """\
0, GPU-1f2e, 81559, 80994, 9.0, 580.82.07, NVIDIA H100 80GB HBM3
1, GPU-77aa, 23034, 22000, 8.9, 580.82.07, NVIDIA L4
2, GPU-0bad, 15360, 15000, 7.5, 580.82.07, Tesla T4
3, GPU-9999, [N/A], [N/A], 9.0, 580.82.07, NVIDIA H200
"""


def gpu(**fields: object) -> Gpu:
    known = {
        "name": "NVIDIA L4",
        "bytes": 22 << 30,
        "capability": (8, 9),
        "free_bytes": 22 << 30,
        "driver": "580.82.07",
    }
    return Gpu.model_validate(known | fields)


def test_the_drivers_report_is_read() -> None:
    h100, l4, t4 = parse_gpus(REPORT, None)
    assert (h100.name, h100.capability, h100.driver) == ("NVIDIA H100 80GB HBM3", (9, 0), "580.82.07")
    assert h100.bytes == round(81559 * 2**20 * 0.98) and h100.free_bytes == 80994 * 2**20
    assert (l4.capability, t4.capability) == ((8, 9), (7, 5))
    assert parse_gpus("No devices were found\n", None) == ()


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        ("0", ["NVIDIA H100 80GB HBM3"]),
        ("1,0", ["NVIDIA H100 80GB HBM3", "NVIDIA L4"]),
        ("GPU-77", ["NVIDIA L4"]),
        ("", []),
        ("-1", []),
        ("1,-1,0", ["NVIDIA L4"]),
        ("3", []),
    ],
)
def test_hidden_gpus_are_left_out(visible: str, names: list[str]) -> None:
    assert [gpu.name for gpu in parse_gpus(REPORT, visible)] == names


def test_gpus_are_listed_by_the_drivers_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert list_gpus({}) == ()
    tool = tmp_path / "nvidia-smi"
    (tmp_path / "report").write_text(REPORT)
    tool.write_text(f'#!/bin/sh\nwhile read -r line; do echo "$line"; done < {tmp_path}/report\n')
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    assert [gpu.name for gpu in list_gpus({"CUDA_VISIBLE_DEVICES": "1"})] == ["NVIDIA L4"]
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert list_gpus({}) == ()


def test_an_old_driver_runs_a_newer_cuda_by_the_compatibility_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Library:
        @staticmethod
        def cuDriverGetVersion(version: object) -> int:  # noqa: N802
            version._obj.value = 13020  # type: ignore[attr-defined]
            return 0

    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho '0, GPU-1f2e, 143771, 143000, 9.0, 550.54.15, NVIDIA H200'\n")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Library)
    (h200,) = list_gpus({})
    assert (h200.driver, h200.library_cuda) == ("550.54.15", 13)
    assert gpu_problem(h200, "13.0") is None
    assert gpu_problem(h200.model_copy(update={"library_cuda": 12}), "13.0") is not None


def test_torchs_cuda_version_is_that_of_its_build() -> None:
    import torch

    assert torch_cuda_version() == torch.version.cuda


@pytest.mark.parametrize(
    ("driver", "cuda", "refused"),
    [
        ("580.82.07", "13.0", False),
        ("580.65.06", "13.0", False),
        ("575.57.08", "13.0", True),
        ("525.60.13", "12.8", False),
        ("470.82.01", "12.8", True),
        ("999", "13.0", False),
        ("580.82", "99.0", False),
        ("unknown", "13.0", False),
    ],
)
def test_the_driver_must_be_new_enough_for_torchs_cuda(driver: str, cuda: str, *, refused: bool) -> None:
    problem = driver_problem(gpu(driver=driver), cuda)
    assert (problem is not None) is refused
    if problem:
        assert driver in problem and "update the driver" in problem


def test_a_gpu_that_torch_cannot_use_is_refused_with_the_reason() -> None:
    assert gpu_problem(gpu(), "13.0") is None
    assert gpu_problem(gpu(capability=(8, 0)), "13.0") is None
    old = gpu_problem(gpu(name="Tesla T4", capability=(7, 5)), "13.0")
    assert old and "Tesla T4 has compute capability 7.5, and loramill needs 8.0" in old
    no_cuda = gpu_problem(gpu(), None)
    assert no_cuda and "build without CUDA" in no_cuda
    driver = gpu_problem(gpu(driver="470.1"), "13.0")
    assert driver and "470.1" in driver


def test_as_many_shares_fit_a_gpu_as_share_it() -> None:
    for count in range(1, 17):
        assert count * ray_share(1 / count) <= 1 < (count + 1) * ray_share(1 / count)
    assert ray_share(0.5) == 0.5
