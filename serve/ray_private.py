"""Ray Serve's private API: all of it that loramill uses, as of Ray 2.60 (tests/test_private_apis.py compares)."""

from __future__ import annotations

from dataclasses import replace

from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica


def by_value(handle: DeploymentHandle) -> DeploymentHandle:
    """A handle whose calls go by gRPC, with their arguments inside.

    A call takes half the time of one by Ray, and a request is not an object that others may fetch.
    """
    return handle.options(_by_reference=False)


class RequestRouterByCall(RequestRouter):  # type: ignore[misc]  # Ray is untyped here
    """A request router that distinguishes the calls which a replica makes on behalf of one call to it.

    They have one id, by which Serve's own router finds the call that a replica was chosen for: all but the first would
    wait forever.
    """

    async def _choose_replica_for_request(
        self, pending_request: PendingRequest, *, is_retry: bool = False
    ) -> RunningReplica:
        if not is_retry:
            own = f"{pending_request.metadata.internal_request_id}-{id(pending_request):x}"
            pending_request.metadata = replace(pending_request.metadata, internal_request_id=own)
        return await super()._choose_replica_for_request(pending_request, is_retry=is_retry)
