"""The gateway: an OpenAI-compatible API over the registry and a backend that generates text."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from fastapi import FastAPI

import loramill
from loramill.data.tokenizer import ChatTokenizer
from loramill.models.catalog import Base
from loramill.registry import Registry
from loramill.serve.api.dependencies import Gateway, ServedBase
from loramill.serve.api.docs import add_docs
from loramill.serve.api.errors import add_error_handlers
from loramill.serve.api.generation.model_lookup import route_cache, version_cache
from loramill.serve.api.limits.flush import usage_flusher
from loramill.serve.api.limits.tracker import UsageTracker
from loramill.serve.api.middleware.access_log import AccessLogMiddleware
from loramill.serve.api.middleware.authentication import AuthenticationMiddleware
from loramill.serve.api.middleware.body_limit import BodyLimitMiddleware
from loramill.serve.api.middleware.cors import GatewayCORSMiddleware
from loramill.serve.api.middleware.internal_errors import InternalErrorMiddleware
from loramill.serve.api.middleware.request_id import RequestIdMiddleware
from loramill.serve.api.openapi import DESCRIPTION, TAGS, extend_openapi
from loramill.serve.api.routes import (
    adapters,
    audit,
    chat,
    completions,
    deletion,
    feedback,
    files,
    fine_tuning,
    health,
    job_batches,
    models,
    tenants,
    usage,
)
from loramill.serve.api.storage.consent import stored_cache, tenant_cache
from loramill.serve.api.storage.writer import CompletionWriter
from loramill.serve.api.traffic.flush import traffic_flusher
from loramill.serve.api.traffic.shadow import ShadowRunner
from loramill.serve.api.traffic.tracker import TrafficTracker
from loramill.serve.protocol import GenerationBackend
from loramill.settings import Settings
from loramill.submission.dataset_checks import DatasetChecks

#: All endpoints, in the order in which the documentation lists them.
ROUTERS = (
    chat.router,
    completions.router,
    models.router,
    *feedback.ROUTERS,
    files.router,
    fine_tuning.router,
    job_batches.router,
    *adapters.ROUTERS,
    deletion.router,
    tenants.router,
    usage.router,
    audit.router,
    health.router,
)

#: Paths that accept files.
_UPLOAD_PATHS = re.compile(rf"{files.FILES_PATH}|/v1/adapters/[^/]+/[^/]+/import")


def build_api(
    *,
    registry: Registry,
    base: Base,
    tokenizer: ChatTokenizer,
    backend: GenerationBackend,
    settings: Settings,
    other_bases: Sequence[ServedBase] = (),
) -> FastAPI:
    """Builds the gateway's app.

    Args:
        registry: the registry, open.
        base: the base model that `backend` serves and that new jobs train.
        tokenizer: the base's tokenizer, for validating data.
        backend: generates text.
        settings: limits of uploads and of training files, CORS origins, and more.
        other_bases: more base models that are served.
    """
    usage_tracker, writer, traffic = UsageTracker(), CompletionWriter(registry), TrafficTracker()
    shadows = ShadowRunner(traffic)
    app = FastAPI(
        title="loramill",
        version=loramill.__version__,
        description=DESCRIPTION,
        openapi_tags=TAGS,
        docs_url=None,
        redoc_url=None,
        lifespan=lambda _: _background(usage_tracker, writer, traffic, shadows, registry),
    )
    served = {each.base.name: each for each in (ServedBase(base, backend), *other_bases)}
    dataset_checks = DatasetChecks(registry.artifacts, tokenizer)
    grace_seconds = settings.serve.grace_seconds
    app.state.gateway = Gateway(
        registry,
        base,
        tokenizer,
        served,
        settings,
        dataset_checks,
        version_cache(registry, grace_seconds),
        route_cache(registry, grace_seconds),
        usage_tracker,
        tenant_cache(registry, grace_seconds),
        stored_cache(registry, grace_seconds),
        writer,
        traffic,
        shadows,
    )
    for router in ROUTERS:
        app.include_router(router)
    add_docs(app)
    add_error_handlers(app)
    extend_openapi(app)
    # The middleware that is added last sees a request first.
    app.add_middleware(
        BodyLimitMiddleware, upload_paths=_UPLOAD_PATHS, max_upload_bytes=settings.serve.max_upload_bytes
    )
    app.add_middleware(AuthenticationMiddleware, registry=registry, grace_seconds=settings.serve.grace_seconds)
    app.add_middleware(InternalErrorMiddleware)
    if settings.serve.cors_origins:
        app.add_middleware(GatewayCORSMiddleware, origins=settings.serve.cors_origins)
    app.add_middleware(AccessLogMiddleware)
    app.add_middleware(RequestIdMiddleware)
    return app


@asynccontextmanager
async def _background(
    usage_tracker: UsageTracker,
    writer: CompletionWriter,
    traffic: TrafficTracker,
    shadows: ShadowRunner,
    registry: Registry,
) -> AsyncIterator[None]:
    """Writes usage, traffic and stored completions while the block runs, and what is left of them at its end."""
    async with (
        usage_flusher(usage_tracker, registry),
        traffic_flusher(traffic, registry, usage_tracker.gateway_id),
        writer.running(),
        shadows,
    ):
        yield
