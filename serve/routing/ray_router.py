"""Ray Serve's request router by `loramill.serve.routing.policy`, a part of each handle to an engine deployment.

Serve pickles this module by value, and all others by their names.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RunningReplica

from loramill.serve.protocol import TextRequest
from loramill.serve.ray_private import RequestRouterByCall
from loramill.serve.routing.policy import RecentDispatches, ReplicaReport, route


class AdapterRouter(RequestRouterByCall):
    """Routes a request to a replica that holds its adapter, unless that is overloaded."""

    def initialize_state(self) -> None:
        """Called by Serve in place of a constructor."""
        self._dispatches = RecentDispatches()
        self._reports: dict[ReplicaID, tuple[Mapping[str, Any], ReplicaReport]] = {}

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Orders the replicas for a request, the best first. Serve tries them in turn; if all are full, it waits and
        calls again."""
        version = None
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
            version = version_of(pending_request)
        replicas = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        now = time.monotonic()
        reports = [self._report(replica) for replica in candidate_replicas]
        order = route(version, self._dispatches.candidates(reports, version, now))
        if pending_request is not None and order:
            self._dispatches.record(pending_request.metadata.internal_request_id, order[0], version, now)
        return [[replicas[name]] for name in order]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """Called when a replica has accepted a request; it may not be the best one."""
        request = pending_request.metadata.internal_request_id
        self._dispatches.record(request, replica_id.unique_id, version_of(pending_request), time.monotonic())

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Removes the reports of replicas that are gone."""
        current = {replica.replica_id for replica in replicas}
        self._reports = {name: report for name, report in self._reports.items() if name in current}
        super().update_replicas(replicas)

    def _report(self, replica: RunningReplica) -> ReplicaReport:
        stats = replica.routing_stats
        read, report = self._reports.get(replica.replica_id, (None, None))
        if report is None or read is not stats:
            report = ReplicaReport.from_stats(replica.replica_id.unique_id, stats)
            self._reports[replica.replica_id] = (stats, report)
        return report


def version_of(request: PendingRequest) -> str | None:
    """The adapter that a call to a replica needs; None for the base, and for calls other than generation."""
    match request.args:
        case [TextRequest(version=version), *_]:
            return version
    return None
