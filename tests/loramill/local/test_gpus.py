"""The GPUs of this machine in `loramill up`, `doctor` and `plan`, with mocked discovery."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from loramill.errors import NotEnoughMemory, SetupError
from loramill.gpus.machine import Gpu
from loramill.local import gpus, probes
from loramill.local import up as local_up
from loramill.local.findings import Finding, Status
from loramill.local.gpus import GpuSetup, check_gpu_memory, gpu_findings, settings_of_pool
from loramill.models.catalog import Base
from loramill.settings import Settings
from loramill.types import GpuInfo

H100 = Gpu(name="NVIDIA H100", bytes=79 << 30, capability=(9, 0), free_bytes=79 << 30, driver="580.82.07")
T4 = H100.model_copy(update={"name": "Tesla T4", "capability": (7, 5)})


def setup(**changes: object) -> GpuSetup:
    fields = {
        "cuda": "13.0",
        "visible": [GpuInfo(name="NVIDIA H100", bytes=79 << 30, capability=(9, 0))],
        "machine": [H100],
        "compiler": "/usr/bin/gcc",
        "header": Path("/usr/include/python3.11/Python.h"),
        "bitsandbytes": None,
    }
    return GpuSetup(**{**fields, **changes})  # type: ignore[arg-type]


def findings(changed: GpuSetup, **options: object) -> dict[str, Finding]:
    found = {finding.what: finding for finding in gpu_findings(changed, Settings.model_validate(options))}
    for finding in found.values():
        assert bool(finding.fix) == (finding.status is not Status.OK), finding
    return found


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "list_gpus", lambda: (H100,))
    monkeypatch.setattr(gpus, "torch_cuda_version", lambda: "13.0")


def test_a_good_gpu_has_no_problems(base: Base) -> None:
    found = findings(setup(), base=str(base.folder))
    assert {finding.status for finding in found.values()} == {Status.OK}
    assert found["gpu"].found == "NVIDIA H100 (79 GiB), CUDA 13.0"
    assert "580.82.07" in found["gpu driver"].found and "/usr/bin/gcc" in found["triton"].found
    assert "an engine takes 50%" in found["gpu shares"].found and "KV cache of" in found["gpu shares"].found


def test_a_machine_without_a_gpu_has_one_finding() -> None:
    without = setup(visible=[], machine=[])
    assert [(name, each.status) for name, each in findings(without).items()] == [("gpu", Status.OK)]
    assert findings(without, serve={"device": "cuda"})["gpu"].status is Status.WARN
    assert findings(without, jobs={"use_gpu": True})["gpu"].status is Status.WARN


@pytest.mark.parametrize(
    ("changes", "what", "message"),
    [
        ({"visible": [], "cuda": None}, "gpu", "torch built for CUDA"),
        ({"visible": []}, "gpu", "nvidia-smi"),
        ({"visible": [T4]}, "gpu", "compute capability 7.5, and loramill needs 8.0"),
        ({"machine": [H100.model_copy(update={"driver": "550.54.15"})]}, "gpu driver", "550.54.15 is too old"),
    ],
)
def test_an_unusable_gpu_is_serious_only_where_it_is_required(
    changes: dict[str, object], what: str, message: str
) -> None:
    found = findings(setup(**changes))
    assert found[what].status is Status.WARN and message in found[what].fix
    assert findings(setup(**changes), serve={"device": "cuda"})[what].status is Status.ERROR


def test_what_triton_and_bitsandbytes_need_is_checked() -> None:
    assert "gcc" in findings(setup(compiler=None))["triton"].fix
    assert "python3-dev" in findings(setup(header=None))["triton"].fix
    broken = setup(bitsandbytes="no CUDA library")
    assert findings(broken)["bitsandbytes on the gpu"].status is Status.WARN
    assert findings(broken, quantization="nf4")["bitsandbytes on the gpu"].status is Status.ERROR


def test_an_engine_in_float8_needs_a_gpu_that_has_it(base: Base) -> None:
    fp8 = {"base": str(base.folder), "serve": {"quantization": "fp8"}}
    assert {finding.status for finding in findings(setup(), **fp8).values()} == {Status.OK}
    old = {"capability": (8, 6), "name": "NVIDIA A10"}
    a10 = setup(machine=[H100.model_copy(update=old)], visible=[GpuInfo(bytes=79 << 30, **old)])  # type: ignore[arg-type]
    found = findings(a10, **fp8)["gpu shares"]
    assert found.status is Status.ERROR and "NVIDIA A10 has 8.6" in found.fix
    without = findings(setup(visible=[], machine=[]), **fp8)["serve.quantization"]
    assert without.status is Status.WARN and '"int8" or "nf4" also' in without.fix
    assert "not a mixture of experts" in without.fix


def test_a_gpu_that_fp8_lacks_is_reported_once() -> None:
    for lacking in (setup(visible=[], machine=[]), setup(visible=[], cuda=None)):
        found = findings(lacking, serve={"quantization": "fp8", "device": "cuda"})
        assert [name for name, each in found.items() if each.status is not Status.OK] == ["gpu"]


def test_this_pythons_headers_and_compiler_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header = gpus.python_header()
    assert header is None or header.name == "Python.h"
    monkeypatch.setattr("sysconfig.get_paths", lambda scheme: {"include": str(tmp_path)})
    assert gpus.python_header() is None
    (tmp_path / "Python.h").touch()
    assert gpus.python_header() == tmp_path / "Python.h"
    monkeypatch.setenv("CC", "/opt/cc")
    assert gpus.triton_compiler() == "/opt/cc"
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpus.triton_compiler() is None


def test_memory_that_others_use_is_reported() -> None:
    busy = H100.model_copy(update={"free_bytes": 30 << 30})
    found = findings(setup(machine=[busy]))["gpu shares"]
    assert found.status is Status.WARN and "30.0 GiB free" in found.fix


def test_a_driver_that_does_not_report_its_gpus_is_reported() -> None:
    found = findings(setup(machine=[]))["gpu shares"]
    assert found.status is Status.WARN and "compute,utility" in found.fix


def test_a_base_that_does_not_fit_is_reported(base: Base) -> None:
    small = {"machine": [H100.model_copy(update={"bytes": 1 << 30})]}
    visible = [GpuInfo(name="small", bytes=1 << 30, capability=(9, 0))]
    found = findings(setup(visible=visible, **small), base=str(base.folder))["gpu shares"]
    assert found.status is Status.ERROR and "serve.gpu_fraction" in found.fix


def test_doctor_combines_what_torch_and_the_driver_report(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {
        "threads": 1,
        "capability": "AVX2",
        "cuda": "13.0",
        "gpus": [{"name": "NVIDIA H100", "bytes": 79 << 30, "capability": [9, 0]}],
    }
    reports = {probes._TORCH: seen, probes._BITSANDBYTES: "CUDA binary not found\nand more"}
    monkeypatch.setattr(probes, "_probe", lambda code, *arguments: reports[code])
    monkeypatch.setattr(probes, "list_gpus", lambda: (H100,))
    found = {finding.what: finding for finding in probes.hardware(Settings())}
    assert found["gpu"].found == "NVIDIA H100 (79 GiB), CUDA 13.0"
    assert found["bitsandbytes on the gpu"].found == "CUDA binary not found"
    assert "up to 1 training session 50%" in found["gpu shares"].found


def test_the_base_must_fit_the_shares_of_engine_and_session(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = {"serve": {"device": "cuda", "gpu_fraction": 0.5}, "jobs": {"use_gpu": True, "gpu_fraction": 0.5}}
    settings = Settings.model_validate(shared)
    check_gpu_memory(base, settings, (H100,))
    check_gpu_memory(base, Settings(), (H100,))
    with pytest.raises(NotEnoughMemory, match=r"serve\.gpu_fraction"):
        check_gpu_memory(base, settings, (H100, H100.model_copy(update={"bytes": 2 << 30})))
    busy = H100.model_copy(update={"free_bytes": 2**29})
    with pytest.raises(NotEnoughMemory, match=r"needs more than 1\.0 GB .* 0\.5 GB are free"):
        check_gpu_memory(base, settings, (busy,))
    many = settings.model_copy(update={"jobs": settings.jobs.model_copy(update={"per_gpu": 16})})
    with pytest.raises(NotEnoughMemory, match=r"A training session needs 1\.0 GB .* jobs\.per_gpu"):
        check_gpu_memory(base, many, (H100.model_copy(update={"bytes": 24 << 30}),))


def test_up_decides_the_devices_and_prints_the_decision(
    one_gpu: None, base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_up, "list_gpus", lambda: (H100,))
    printed = io.StringIO()
    decided = local_up.place_on_devices(base, Settings(), Console(file=printed, width=400))
    assert (decided.serve.device, decided.serve.gpu_fraction, decided.jobs.use_gpu) == ("cuda", 0.5, True)
    assert printed.getvalue().startswith("NVIDIA H100 (79 GiB): an engine takes 50%")
    other = replace(base, architecture="GPT2LMHeadModel")
    assert local_up.place_on_devices(other, Settings(), Console(quiet=True)).serve.device == "cpu"
    monkeypatch.setattr(local_up, "list_gpus", lambda: (H100.model_copy(update={"free_bytes": 2**29}),))
    with pytest.raises(NotEnoughMemory, match="end other programs"):
        local_up.place_on_devices(base, Settings(), Console(quiet=True))


def test_up_prints_nothing_without_a_gpu(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_up, "list_gpus", lambda: ())
    printed = io.StringIO()
    decided = local_up.place_on_devices(base, Settings(), Console(file=printed))
    assert (decided.serve.device, decided.jobs.use_gpu, printed.getvalue()) == ("cpu", False, "")
    with pytest.raises(SetupError, match="none on this machine"):
        local_up.place_on_devices(base, Settings(serve={"device": "cuda"}), Console(file=printed))


def test_jobs_are_sized_for_this_machine_unless_others_train(one_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = settings_of_pool(Settings()).jobs
    assert (jobs.on_gpu, jobs.device_bytes, jobs.gpu_fraction) == (True, 79 << 30, 0.5)
    elsewhere = Settings(jobs={"use_gpu": True})
    assert settings_of_pool(elsewhere) is elsewhere
    monkeypatch.setattr(gpus, "list_gpus", lambda: ())
    remote = Settings(serve={"device": "cuda"})
    assert settings_of_pool(remote) is remote
