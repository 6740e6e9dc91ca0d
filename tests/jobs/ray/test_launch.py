"""The processes that start and watch trainers do not train."""

import subprocess
import sys


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
