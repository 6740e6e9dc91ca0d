"""Ray Serve's autoscaling of engine replicas by `loramill.serve.autoscaling.policy`; it runs in Serve's controller.

Serve pickles this module by value, and everything else by its name.
"""

from __future__ import annotations

import logging
from dataclasses import fields
from typing import Any

from ray.serve.config import AutoscalingContext

from loramill.serve.autoscaling.policy import ReplicaLoad, ReplicaSet, ScalingTargets, decide

#: How Serve is told to look once a second and to leave every delay to the policy.
UNDELAYED: dict[str, Any] = {
    "metrics_interval_s": 0.5,
    "look_back_period_s": 2.0,
    "upscale_delay_s": 0.0,
    "downscale_delay_s": 0.0,
    "downscale_to_zero_delay_s": 0.0,
}


class Policy:
    """An autoscaling policy; takes `Targets` by name: the deployment's `policy_kwargs`."""

    def __init__(self, **targets: float) -> None:
        self._targets = ScalingTargets(**targets)

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """How many replicas there are to be, and what Serve keeps until it asks again, ten times a second."""
        decision = decide(replica_set_of(context), context.policy_state.get("memory"), self._targets)
        if decision.replicas != context.target_num_replicas:
            logging.getLogger("ray.serve").info(
                "%s: %d replicas instead of %d: %s",
                context.deployment_name,
                decision.replicas,
                context.target_num_replicas,
                decision.reason.value,
            )
        return decision.replicas, {"memory": decision.state}


def replica_set_of(context: AutoscalingContext) -> ReplicaSet:
    """What Serve knows of a deployment. A replica says how it is by `record_autoscaling_stats`, the fields of a
    `ReplicaLoad`; one that hasn't yet is idle."""
    said = context.raw_metrics or {}
    names = [field.name for field in fields(ReplicaLoad)]

    def load(replica: Any) -> ReplicaLoad:
        series = {name: said.get(name, {}).get(replica) for name in names}
        return ReplicaLoad(**{name: points[-1].value for name, points in series.items() if points})

    return ReplicaSet(
        now=context.current_time or 0.0,
        target_replicas=context.target_num_replicas,
        loads=tuple(map(load, context.running_replicas)),
        queued_requests=context.total_queued_requests,
        min_replicas=context.capacity_adjusted_min_replicas,
        max_replicas=context.capacity_adjusted_max_replicas,
    )
