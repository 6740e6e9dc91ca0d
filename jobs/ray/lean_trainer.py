"""Ray Train's trainer without the processes of 200 MB each that it starts besides controllers and workers.

The only module that uses private names of Ray Train; tests/test_private_apis.py names the version they were read from.
"""

from __future__ import annotations

from typing import Any

from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

_UNUSED_CALLBACKS = (DatasetsCallback, PlacementGroupCleanerCallback)


class _FixedScaling(FixedScalingPolicy):  # type: ignore[misc]  # untyped
    """A fixed number of workers, requested only by their placement group, which Ray's autoscaler regards.

    Ray Train requests them a second time, from an actor that coordinates it with Ray Data: its process takes 1.5 s of
    CPU before the first worker of a cluster can start.
    """

    def after_controller_start(self, train_run_context: Any) -> None:
        """Starts no coordinator."""

    def _maybe_send_resource_request(self) -> None:
        pass


class LeanTrainer(DataParallelTrainer):  # type: ignore[misc]  # untyped
    """A trainer whose workers read no Ray data sets, and whose placement groups `orphans` removes.

    It imports torch only if its backend does. Ray's own cleaner of placement groups queries the dashboard, and logs a
    warning each second where there is none.
    """

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        return [callback for callback in callbacks if not isinstance(callback, _UNUSED_CALLBACKS)]

    def _initialize_and_run_controller(self, **options: Any) -> Any:
        policy = _FixedScaling(scaling_config=self.scaling_config)
        return super()._initialize_and_run_controller(**{**options, "scaling_policy": policy})
