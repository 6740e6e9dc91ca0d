"""Removes placement groups whose Train controller is dead, which would keep their GPUs reserved.

Ray removes a group when the Ray job that created it ends, and the supervisor's never does. Ray Train has a cleaner for
this in each trainer, which queries the dashboard; a laptop has no dashboard, and `lean_trainer` leaves the cleaner out.
Which actor created a group is only in Ray's tables, not in its API.

The only module that uses private names of Ray Core; tests/test_private_apis.py names the version they were read from.
"""

from __future__ import annotations

import logging

import ray
from ray._private.state import state
from ray.core.generated import gcs_pb2
from ray.util.placement_group import PlacementGroup, remove_placement_group

log = logging.getLogger(__name__)

#: Class of Ray Train's controller actors.
_CONTROLLER_CLASS = "TrainController"


def remove_orphans() -> int:
    """Removes the placement groups of dead Train controllers; returns how many."""
    accessor = state._connect_and_get_accessor()
    removed = 0
    for packed in accessor.get_placement_group_table():
        group = gcs_pb2.PlacementGroupTableData.FromString(packed)
        if group.is_detached or not group.creator_actor_dead or group.state == group.REMOVED:
            continue
        creator = accessor.get_actor_info(ray.ActorID(group.creator_actor_id))
        if creator is None or gcs_pb2.ActorTableData.FromString(creator).class_name != _CONTROLLER_CLASS:
            continue
        remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))
        removed += 1
    if removed:
        log.warning("removed %d placement groups of dead Train controllers", removed)
    return removed
