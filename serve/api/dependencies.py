"""Dependencies of the endpoints: parameters annotated `GatewayDep` and `CallerDep`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from loramill.data.tokenizer import ChatTokenizer
from loramill.models.catalog import Base
from loramill.names import AdapterName
from loramill.registry import Registry
from loramill.serve.api.cache import ReadThroughCache
from loramill.serve.api.limits.tracker import UsageTracker
from loramill.serve.api.middleware.authentication import Caller
from loramill.serve.api.storage.writer import CompletionWriter
from loramill.serve.api.traffic.shadow import ShadowRunner
from loramill.serve.api.traffic.tracker import TrafficTracker
from loramill.serve.protocol import GenerationBackend
from loramill.settings import Settings
from loramill.submission.dataset_checks import DatasetChecks
from loramill.submission.submit import SubmissionContext
from loramill.types import RolloutRecord, TenantRecord, VersionRecord


@dataclass(frozen=True, slots=True)
class ServedBase:
    """A base model, and the backend that serves it and its adapters."""

    base: Base
    backend: GenerationBackend


@dataclass(frozen=True, slots=True)
class AdapterRoute:
    """The versions that answer requests for an adapter without a version.

    Attributes:
        champion: the version that answers.
        rollout: a canary or shadow of the adapter; None: there is none.
        challenger: the version that the rollout tries.
    """

    champion: VersionRecord
    rollout: RolloutRecord | None = None
    challenger: VersionRecord | None = None


@dataclass(frozen=True, slots=True)
class Gateway:
    """Everything that endpoints share.

    Attributes:
        registry: the registry.
        base: the base model that new jobs train.
        tokenizer: the tokenizer of `base`.
        served: the base models that are served, by name.
        settings: the settings.
        dataset_checks: cached checks of files.
        version_cache: the version of an adapter and an alias or version prefix.
        routes: the versions that answer for an adapter without a version.
        usage_tracker: limits and usage of the tenants.
        tenant_cache: tenants with their settings, by name.
        stored_cache: bytes that tenants store, by name.
        completions: writes stored completions.
        traffic: what the answers of versions are like.
        shadows: copies of requests that run in the background.
    """

    registry: Registry
    base: Base
    tokenizer: ChatTokenizer
    served: Mapping[str, ServedBase]
    settings: Settings
    dataset_checks: DatasetChecks
    version_cache: ReadThroughCache[tuple[AdapterName, str], VersionRecord]
    routes: ReadThroughCache[AdapterName, AdapterRoute]
    usage_tracker: UsageTracker
    tenant_cache: ReadThroughCache[str, TenantRecord]
    stored_cache: ReadThroughCache[str, int]
    completions: CompletionWriter
    traffic: TrafficTracker
    shadows: ShadowRunner

    @property
    def submission(self) -> SubmissionContext:
        """The context of new jobs."""
        return SubmissionContext(self.base, self.settings.jobs, self.dataset_checks)


# Both are async, so that FastAPI does not call them in a thread.
async def _get_gateway(request: Request) -> Gateway:
    gateway: Gateway = request.app.state.gateway
    return gateway


async def _get_caller(request: Request) -> Caller:
    caller: Caller = request.state.caller
    return caller


async def _get_written_gateway(request: Request) -> Gateway:
    """The gateway, after it has written its stored completions, so that the endpoint can read them."""
    gateway: Gateway = request.app.state.gateway
    await gateway.completions.flush()
    return gateway


GatewayDep = Annotated[Gateway, Depends(_get_gateway)]
CallerDep = Annotated[Caller, Depends(_get_caller)]
#: For endpoints that read stored completions.
WrittenGatewayDep = Annotated[Gateway, Depends(_get_written_gateway)]
