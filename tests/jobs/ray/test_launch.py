"""The processes that start and watch trainers do not train."""

import subprocess
import sys


def test_the_supervisor_imports_nothing_that_trains():
    code = "import sys, loramill.pipelines.cluster.deploy, loramill.jobs.ray.supervisor; print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "peft", "bitsandbytes", "ray.train"} & set(ran.stdout.split())


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
