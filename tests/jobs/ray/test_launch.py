"""Trainers are started and watched by processes that don't train."""

import subprocess
import sys


def test_who_starts_trainers_loads_nothing_that_trains():
    code = "import sys, loramill.pipelines.cluster.deploy, loramill.jobs.ray.supervisor; print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "peft", "bitsandbytes", "ray.train"} & set(ran.stdout.split())


def test_a_trainer_of_sessions_loads_no_torch_where_it_is_started():
    code = "import sys, loramill.jobs.ray.lean_trainer; print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "peft", "bitsandbytes"} & set(ran.stdout.split())


def test_what_a_trainer_does_without():
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    from loramill.jobs.ray.lean_trainer import LeanTrainer

    def callbacks(trainer: type[DataParallelTrainer]) -> set[str]:
        return {type(callback).__name__ for callback in trainer(print)._create_default_callbacks()}

    assert callbacks(DataParallelTrainer) - callbacks(LeanTrainer) == {
        "DatasetsCallback",
        "PlacementGroupCleanerCallback",
    }
    assert "BackendSetupCallback" in callbacks(LeanTrainer)
