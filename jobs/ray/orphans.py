"""Placement groups whose Train controller is dead, with the GPUs that they keep from everybody.

Ray removes a group when the job that made it has ended, and the supervisor's never does. Ray Train has a cleaner for
this, one a trainer, which asks the dashboard; a laptop does without, and `lean_trainer` leaves it out. Who made a group
is in Ray's tables alone, not in its API.
"""

from __future__ import annotations

import logging

import ray
from ray._private.state import state
from ray.core.generated import gcs_pb2
from ray.util.placement_group import PlacementGroup, remove_placement_group

log = logging.getLogger(__name__)

#: The class of Ray Train's controllers.
_CONTROLLER_CLASS = "TrainController"


def remove_orphans() -> int:
    """Removes the groups of dead Train controllers; returns how many there were."""
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
        log.warning("removed %d placement groups of Train controllers that are gone", removed)
    return removed
