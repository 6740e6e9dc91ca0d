"""Ray's trainer without two processes that it starts beside each worker, of 200 MB each."""

from __future__ import annotations

from typing import Any

from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

_UNUSED_CALLBACKS = (DatasetsCallback, PlacementGroupCleanerCallback)


class LeanTrainer(DataParallelTrainer):  # type: ignore[misc]  # untyped
    """A trainer whose workers read no Ray data sets and whose placement groups `leftovers` looks after.

    It imports no torch unless its backend does. Ray's own cleaner of placement groups asks the dashboard, and says each
    second in the log where there is none.
    """

    def _create_default_callbacks(self) -> list[Any]:
        return [
            callback for callback in super()._create_default_callbacks() if not isinstance(callback, _UNUSED_CALLBACKS)
        ]
