"""Ray's trainer without two processes that it starts beside each worker, of 200 MB each."""

from __future__ import annotations

from typing import Any

from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

_NEEDLESS = (DatasetsCallback, PlacementGroupCleanerCallback)


class LeanTrainer(TorchTrainer):  # type: ignore[misc]  # untyped
    """A `TorchTrainer` whose workers read no Ray data sets and whose placement groups `leftovers` looks after.

    Ray's own cleaner of these asks the dashboard, and where there is none, it says so in the log each second.
    """

    def _create_default_callbacks(self) -> list[Any]:
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, _NEEDLESS)]
