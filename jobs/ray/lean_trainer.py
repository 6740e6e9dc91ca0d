"""Ray Train's trainer without two processes of 200 MB each that it starts with each worker.

The only module that uses private names of Ray Train; tests/test_private_apis.py names the version they were read from.
"""

from __future__ import annotations

from typing import Any

from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

_UNUSED_CALLBACKS = (DatasetsCallback, PlacementGroupCleanerCallback)


class LeanTrainer(DataParallelTrainer):  # type: ignore[misc]  # untyped
    """A trainer whose workers read no Ray data sets, and whose placement groups `orphans` removes.

    It imports torch only if its backend does. Ray's own cleaner of placement groups queries the dashboard, and logs a
    warning each second where there is none.
    """

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        return [callback for callback in callbacks if not isinstance(callback, _UNUSED_CALLBACKS)]
