"""What every endpoint works with, and how it gets it: parameters annotated `Here` and `Who`."""

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
from loramill.serve.protocol import GenerationBackend
from loramill.settings import Settings
from loramill.submission.dataset_checks import DatasetChecks
from loramill.submission.submit import SubmissionContext
from loramill.types import VersionRecord


@dataclass(frozen=True, slots=True)
class ServedBase:
    """A base that can be asked, and what answers for it and for its adapters."""

    base: Base
    backend: GenerationBackend


@dataclass(frozen=True, slots=True)
class Gateway:
    """The record, the bases that are served, and what is known of files.

    Attributes:
        base: the one that new jobs train on.
        tokenizer: its.
        served: it and any others, by name.
        versions: what an adapter's alias or prefix of a version names.
        books: what tenants use here.
    """

    registry: Registry
    base: Base
    tokenizer: ChatTokenizer
    served: Mapping[str, ServedBase]
    settings: Settings
    dataset_checks: DatasetChecks
    version_cache: ReadThroughCache[tuple[AdapterName, str], VersionRecord]
    usage_tracker: UsageTracker

    @property
    def submission(self) -> SubmissionContext:
        """What new jobs are checked against."""
        return SubmissionContext(self.base, self.settings.jobs, self.dataset_checks)


# Both are async, so that FastAPI needs no thread to call them.
async def _get_gateway(request: Request) -> Gateway:
    gateway: Gateway = request.app.state.gateway
    return gateway


async def _get_caller(request: Request) -> Caller:
    caller: Caller = request.state.caller
    return caller


GatewayDep = Annotated[Gateway, Depends(_get_gateway)]
CallerDep = Annotated[Caller, Depends(_get_caller)]
