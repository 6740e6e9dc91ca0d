"""The processes that start and watch trainers do not train."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from loramill.settings import Settings


def test_the_supervisor_imports_nothing_that_trains_or_serves():
    code = "import sys, loramill.pipelines.cluster.deploy, loramill.jobs.ray.supervisor; print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    trains = {"torch", "transformers", "peft", "bitsandbytes", "ray.train"}
    assert not (trains | {"loramill.serve.api.app"}) & set(ran.stdout.split())


def test_the_lean_trainer_imports_no_torch():
    code = "import sys, loramill.jobs.ray.lean_trainer; print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "peft", "bitsandbytes"} & set(ran.stdout.split())


def test_the_lean_trainer_leaves_out_two_callbacks():
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    from loramill.jobs.ray.lean_trainer import LeanTrainer

    def callbacks(trainer: type[DataParallelTrainer]) -> set[str]:
        return {type(callback).__name__ for callback in trainer(print)._create_default_callbacks()}

    assert callbacks(DataParallelTrainer) - callbacks(LeanTrainer) == {
        "DatasetsCallback",
        "PlacementGroupCleanerCallback",
    }
    assert "BackendSetupCallback" in callbacks(LeanTrainer)


def test_the_lean_trainer_starts_its_workers_without_a_coordinator():
    from ray.train import ScalingConfig

    from loramill.jobs.ray.lean_trainer import _FixedScaling

    policy = _FixedScaling(ScalingConfig(num_workers=2))
    policy.after_controller_start(None)
    assert policy.make_decision_for_non_running_worker_group().num_workers == 2
    policy.make_decision_for_running_worker_group(None, None)
    policy.before_controller_abort()
    assert policy._coordinator_client is None


@pytest.mark.parametrize(
    ("options", "run", "resources", "accelerator", "allocator"),
    [
        ({}, "session", {"CPU": 1.0}, None, False),
        ({"use_gpu": False, "accelerator_type": "L4"}, "session", {"CPU": 1.0}, None, False),
        ({"use_gpu": True}, "session", {"GPU": 1.0}, None, True),
        ({"use_gpu": True, "per_gpu": 3, "accelerator_type": "L4"}, "session", {"GPU": 0.3333}, "L4", True),
        ({"use_gpu": True, "per_gpu": 2, "gpu_fraction": 0.5}, "session", {"GPU": 0.25}, None, True),
        ({"use_gpu": True, "per_gpu": 2, "gpu_fraction": 0.5}, 1, {"GPU": 0.5}, None, True),
        ({"use_gpu": True, "per_gpu": 2, "gpu_fraction": 0.5}, 2, {"GPU": 1.0}, None, True),
    ],
)
def test_a_worker_requests_its_share_of_a_gpu(
    options: dict[str, object],
    run: str | int,
    resources: dict[str, float],
    accelerator: str | None,
    allocator: bool,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    from loramill.jobs.ray import launch, lean_trainer

    made: dict[str, Any] = {}

    class Trainer:
        def __init__(self, train: object, **options: Any) -> None:
            made.update(options)

        def fit(self) -> None:
            pass

    monkeypatch.setattr(lean_trainer, "LeanTrainer", Trainer)
    settings = Settings(home=tmp_path, jobs=options)
    if isinstance(run, int):
        launch.run_dedicated(settings, "job", run)
    else:
        launch.run_session(settings, "slot", "holder")
    scaling = made["scaling_config"]
    assert (scaling.resources_per_worker, scaling.use_gpu) == (resources, "GPU" in resources)
    assert (scaling.accelerator_type, scaling.num_workers) == (accelerator, run if isinstance(run, int) else 1)
    variables = made["run_config"].worker_runtime_env["env_vars"]
    assert variables["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] == "1"
    assert ("PYTORCH_CUDA_ALLOC_CONF" in variables) is allocator
    # What the worker reads is what was requested of Ray.
    sent = Settings.model_validate(made["train_loop_config"]["settings"])
    assert not sent.jobs.on_gpu or sent.jobs.gpu_share == resources["GPU"]
