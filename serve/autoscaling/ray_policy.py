"""Ray Serve's autoscaling of engine replicas by `loramill.serve.autoscaling.policy`; it runs in Serve's controller.

Serve pickles this module by value, and all others by their names.
"""

from __future__ import annotations

import logging
from dataclasses import fields
from typing import Any

from ray.serve.config import AutoscalingContext

from loramill.serve.autoscaling.policy import ReplicaLoad, ReplicaSet, ScalingTargets, decide

#: Makes Serve call the policy often, and leaves all delays to the policy.
UNDELAYED: dict[str, Any] = {
    "metrics_interval_s": 0.5,
    "look_back_period_s": 2.0,
    "upscale_delay_s": 0.0,
    "downscale_delay_s": 0.0,
    "downscale_to_zero_delay_s": 0.0,
}


class Policy:
    """An autoscaling policy.

    Args:
        targets: fields of `ScalingTargets`; the deployment's `policy_kwargs`.
    """

    def __init__(self, **targets: float) -> None:
        self._targets = ScalingTargets(**targets)

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """The number of replicas, and the state for the next call; Serve calls this ten times per second."""
        decision = decide(replica_set_of(context), context.policy_state.get("state"), self._targets)
        if decision.replicas != context.target_num_replicas:
            logging.getLogger("ray.serve").info(
                "%s: scaling from %d to %d replicas: %s",
                context.deployment_name,
                context.target_num_replicas,
                decision.replicas,
                decision.reason.value,
            )
        return decision.replicas, {"state": decision.state}


def replica_set_of(context: AutoscalingContext) -> ReplicaSet:
    """The replicas of a deployment as Serve reports them.

    `record_autoscaling_stats` of a replica returns the fields of a `ReplicaLoad`; without a report, a replica is idle.
    """
    metrics = context.raw_metrics or {}
    names = [field.name for field in fields(ReplicaLoad)]

    def load(replica: Any) -> ReplicaLoad:
        series = {name: metrics.get(name, {}).get(replica) for name in names}
        return ReplicaLoad(**{name: points[-1].value for name, points in series.items() if points})

    return ReplicaSet(
        now=context.current_time or 0.0,
        target_replicas=context.target_num_replicas,
        loads=tuple(map(load, context.running_replicas)),
        queued_requests=context.total_queued_requests,
        min_replicas=context.capacity_adjusted_min_replicas,
        max_replicas=context.capacity_adjusted_max_replicas,
    )
