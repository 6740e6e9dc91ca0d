"""Whether a request's completion is stored: only if it has `store: true` and its tenant has consented."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from loramill.errors import InvalidRequest, QuotaExceeded
from loramill.registry import Registry, tenants
from loramill.serve.api.cache import ReadThroughCache
from loramill.serve.api.dependencies import Gateway
from loramill.serve.api.generation.model_lookup import Target
from loramill.serve.api.schemas.generation import GenerationRequest
from loramill.types import CompletionKind, CompletionRecord, TenantRecord

#: Longest `user` that can be stored.
MAX_USER_LENGTH = 512


@dataclass(frozen=True, slots=True)
class Storing:
    """A completion that is stored once it has ended.

    Attributes:
        add: called with the completion.
    """

    add: Callable[[CompletionRecord], bool]
    kind: CompletionKind
    target: Target
    user: str | None
    metadata: dict[str, str]
    request: dict[str, Any]

    def keep(self, response: dict[str, Any]) -> None:
        """Keeps the completion with its response object; log probabilities are left out."""
        choices = [{**choice, "logprobs": None} for choice in response["choices"]]
        record = CompletionRecord(
            id=response["id"],
            kind=self.kind,
            tenant=self.target.tenant,
            adapter=None if self.target.version is None else self.target.name,
            version=self.target.version,
            model=self.target.model,
            user=self.user,
            metadata=self.metadata,
            request=self.request,
            response={**response, "choices": choices},
            created_at=time.time(),
        )
        self.add(record)


async def storing(
    gateway: Gateway, target: Target, body: GenerationRequest, kind: CompletionKind, request: dict[str, Any]
) -> Storing | None:
    """Returns how the completion of a request is stored; None: it is not.

    A request that its tenant's settings do not allow to be stored is refused. OpenAI's clients show no header of a
    response, so ignoring `store` would be noticed only when the completions are missing.

    Args:
        request: what is stored of the request.

    Raises:
        InvalidRequest: the tenant has not consented, there is none, or `user` can't be stored.
        QuotaExceeded: the tenant stores as many bytes as it may.
    """
    if not body.store:
        return None
    if not target.tenant:
        raise InvalidRequest(
            "'store' is true, and an admin key has no tenant whose completions could be stored: name one in the header "
            "OpenAI-Organization (in Python: OpenAI(organization=\"acme\")), or leave 'store' out.",
            param="store",
        )
    tenant = await gateway.tenant_cache.get(target.tenant)
    if not tenant.store_completions:
        raise InvalidRequest(
            f"'store' is true, but the tenant '{target.tenant}' has not consented to storing completions: an admin "
            f"records its consent with `loramill tenant storage {target.tenant} --store`. Nothing was generated; leave "
            "'store' out to get an answer that is not stored.",
            param="store",
        )
    if tenant.stored_bytes is not None:
        stored = await gateway.stored_cache.get(target.tenant)
        if stored >= tenant.stored_bytes:
            raise QuotaExceeded(
                f"'store' is true, but '{target.tenant}' stores {stored} bytes and may store {tenant.stored_bytes}: "
                "delete files or completions, ask an admin for a larger limit, or leave 'store' out.",
                param="store",
            )
    if body.user is not None and (len(body.user) > MAX_USER_LENGTH or "\x00" in body.user):
        raise InvalidRequest(
            f"'user' has {len(body.user)} characters; with 'store' it has at most {MAX_USER_LENGTH}, without NUL.",
            param="user",
        )
    return Storing(gateway.completions.buffer.add, kind, target, body.user, dict(body.metadata or {}), request)


def stored_cache(registry: Registry, grace_seconds: float = 0.0) -> ReadThroughCache[str, int]:
    """Caches the bytes that tenants store; it lags behind by what is written in half a second."""
    return ReadThroughCache(registry, tenants.count_stored_bytes, grace_seconds=grace_seconds)


def tenant_cache(registry: Registry, grace_seconds: float = 0.0) -> ReadThroughCache[str, TenantRecord]:
    """Caches tenants with their settings."""
    return ReadThroughCache(registry, tenants.get, grace_seconds=grace_seconds)
