"""What `loramill up`, `doctor` and `plan` decide on machines with and without GPUs, which a fake nvidia-smi reports."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from loramill.cli import app
from loramill.jobs.ray import launch, lean_trainer
from loramill.local import gpus, probes
from loramill.local import up as local_up
from loramill.models.catalog import Base
from loramill.serve import deployments
from loramill.settings import Settings

H100 = "81559, 81000, 9.0, 580.82.07, NVIDIA H100 80GB HBM3"
L4 = "23034, 22500, 8.9, 580.82.07, NVIDIA L4"
T4 = "15360, 15000, 7.5, 580.82.07, Tesla T4"

Machine = Callable[..., None]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Gives this machine GPUs, as lines of nvidia-smi without index and UUID, and a torch that was built for CUDA."""

    def give(*lines: str) -> None:
        report = "\n".join(f"{index}, GPU-{index}, {line}" for index, line in enumerate(lines))
        tool = tmp_path / "nvidia-smi"
        tool.write_text(f"#!/bin/sh\ncat <<'END'\n{report}\nEND\n")
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.setattr(gpus, "torch_cuda_version", lambda: "13.0")

    return give


@pytest.fixture
def session_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[Settings], tuple[dict[str, float], dict[str, str]]]:
    """Returns a function: the resources and the environment of a training session's process."""

    def request(settings: Settings) -> tuple[dict[str, float], dict[str, str]]:
        made: dict[str, Any] = {}

        class Trainer:
            def __init__(self, train: object, **options: Any) -> None:
                made.update(options)

            def fit(self) -> None:
                pass

        monkeypatch.setattr(lean_trainer, "LeanTrainer", Trainer)
        launch.run_session(settings, "slot", "holder")
        return made["scaling_config"].resources_per_worker, made["run_config"].worker_runtime_env["env_vars"]

    return request


def decided(base: Base, tmp_path: Path, **options: object) -> tuple[Settings, str]:
    """The settings after `up` has placed everything on devices, and what it printed."""
    printed = io.StringIO()
    settings = Settings.model_validate({"home": tmp_path / "home", "base": str(base.folder), **options})
    placed = local_up.place_on_devices(base, settings, Console(file=printed, width=400))
    return placed, printed.getvalue()


@pytest.mark.parametrize(
    ("lines", "jobs", "engine", "session", "sessions", "printed"),
    [
        ([H100], {}, 0.5, 0.5, 1, "an engine takes 50% of a GPU, and up to 1 training session 50%"),
        ([H100], {"per_gpu": 4}, 0.5, 0.125, 4, "up to 4 training sessions 12%"),
        ([H100, H100], {}, 1.0, 1.0, 1, "an engine takes 100% of a GPU, and up to 1 training session 100%"),
        ([L4] * 4, {"per_gpu": 2}, 1.0, 0.5, 6, "up to 6 training sessions 50%"),
    ],
)
def test_engine_and_sessions_share_the_gpus_and_other_processes_see_none(
    machine, session_of, base, tmp_path, lines, jobs, engine, session, sessions, printed
) -> None:
    machine(*lines)
    settings, shown = decided(base, tmp_path, jobs={"sessions": 6, **jobs})
    assert printed in shown
    engine_options = deployments.engine_options(settings)
    resources, environment = session_of(settings)
    assert (engine_options["num_gpus"], resources, settings.jobs.sessions) == (engine, {"GPU": session}, sessions)
    assert engine + sessions * session <= len(lines)
    for variables in (engine_options["runtime_env"]["env_vars"], environment):
        assert variables["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    gateway = gateway_options(settings)
    assert "num_gpus" not in gateway
    # Ray then sets CUDA_VISIBLE_DEVICES to nothing where no GPU was requested.
    for variables in (gateway["runtime_env"]["env_vars"], environment, engine_options["runtime_env"]["env_vars"]):
        assert variables["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] == "1"


def gateway_options(settings: Settings) -> dict[str, Any]:
    """The options of a gateway's process."""
    bound = deployments.application(settings)._bound_deployment
    options: dict[str, Any] = bound.ray_actor_options
    return options


@pytest.mark.parametrize("lines", [[], [T4]])
def test_without_a_usable_gpu_everything_is_on_the_cpu(machine, session_of, base, tmp_path, lines) -> None:
    machine(*lines)
    settings, shown = decided(base, tmp_path, jobs={"sessions": 2})
    assert ("compute capability 7.5" in shown) is bool(lines)
    assert deployments.engine_options(settings)["num_gpus"] == 0
    resources, environment = session_of(settings)
    assert resources == {"CPU": settings.jobs.cpus}
    assert environment == {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1"}
    assert (settings.jobs.sessions, settings.jobs.device_bytes) == (2, None)


@pytest.mark.parametrize("lines", [[H100], []], ids=["one GPU", "no GPU"])
def test_plan_sizes_jobs_for_the_gpu_that_up_trains_on(machine, base, tmp_path, monkeypatch, lines) -> None:
    machine(*lines)
    monkeypatch.setenv("LORAMILL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("LORAMILL_BASE", str(base.folder))
    ran = CliRunner().invoke(app, ["plan", "--json"])
    assert ran.exit_code == 0, ran.output
    plan = json.loads(ran.output)
    if lines:
        # Half of the GPU is the engine's.
        assert plan["fits"] and 35 << 30 < plan["budget"] < 40 << 30
        assert plan["micro_tokens"] == 4096
        assert "KV cache of" in plan["engine"]
    else:
        assert (plan["fits"], plan["engine"]) == (None, None)


def test_doctor_shows_how_the_gpu_will_be_shared(machine, base, monkeypatch) -> None:
    machine(H100)
    seen = {
        "threads": 1,
        "capability": "AVX2",
        "cuda": "13.0",
        "gpus": [{"name": "NVIDIA H100", "bytes": 79 << 30, "capability": [9, 0]}],
    }
    monkeypatch.setattr(probes, "_probe", lambda code, *arguments: seen if code == probes._TORCH else None)
    found = {finding.what: finding for finding in probes.hardware(Settings(base=str(base.folder)))}
    assert found["gpu driver"].found == "580.82.07, for torch's CUDA 13.0"
    assert "an engine takes 50%" in found["gpu shares"].found
    assert "KV cache of" in found["gpu shares"].found
