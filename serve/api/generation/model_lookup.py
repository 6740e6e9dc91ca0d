"""Resolves the `model` of a request: authorizes, looks up, and pins the version."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import lru_cache

from loramill.errors import ModelNotFound
from loramill.models.catalog import Base
from loramill.names import SHORT_HASH_LENGTH, AdapterName, ModelName
from loramill.registry import Registry, adapters
from loramill.serve.api.cache import ReadThroughCache
from loramill.serve.api.dependencies import Gateway, ServedBase
from loramill.serve.api.middleware.authentication import Caller
from loramill.types import VersionRecord


@dataclass(frozen=True, slots=True)
class Target:
    """The model of a request, pinned from admission to the last token, whatever is promoted meanwhile.

    Attributes:
        model: the name in the request.
        served: the base model and its backend.
        tenant: the tenant that the usage is counted for.
        version: the adapter's version; None: the base model alone.
        created_at: when the version or base was created, in seconds since the epoch.
        fingerprint: OpenAI's `system_fingerprint`.
    """

    model: str
    served: ServedBase
    tenant: str
    version: str | None
    created_at: float
    fingerprint: str

    @property
    def name(self) -> str:
        """Name of the base or the adapter, without the `@` and what follows."""
        return self.model.partition("@")[0]

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the response."""
        return {"x-loramill-version": self.version} if self.version else {}


async def find_model(gateway: Gateway, caller: Caller, text: str) -> Target:
    """Resolves a model's name. Promotions by another gateway are seen within half a second.

    Raises:
        Forbidden: the adapter belongs to another tenant, whether it exists or not.
        ModelNotFound: the base, adapter, alias or version does not exist.
    """
    name = ModelName.parse(text)
    if name.adapter is None:
        served = gateway.served.get(name.base or "")
        if served is None:
            bases = ", ".join(f"'{base}'" for base in gateway.served)
            raise ModelNotFound(
                f"The model '{text}' does not exist. Base models: {bases}; adapters are tenant/adapter.", param="model"
            )
        fingerprint = served.base.fingerprint[:SHORT_HASH_LENGTH]
        return Target(text, served, caller.tenant or "", None, base_created_at(served.base), fingerprint)
    caller.check_adapter(name.adapter.tenant)
    version = await gateway.version_cache.get((name.adapter, name.selector))
    served = next((each for each in gateway.served.values() if each.base.fingerprint == version.base), None)
    if served is None:
        raise ModelNotFound(f"The model '{text}' was trained on a base that is not served here.", param="model")
    fingerprint = f"{version.base[:SHORT_HASH_LENGTH]}-{version.id[:SHORT_HASH_LENGTH]}"
    return Target(text, served, caller.tenant or name.adapter.tenant, version.id, version.created_at, fingerprint)


@lru_cache
def base_created_at(base: Base) -> float:
    """When a base was created, in seconds since the epoch: the time of its config.json, or now."""
    try:
        return (base.folder / "config.json").stat().st_mtime
    except OSError:
        return time.time()


def version_cache(
    registry: Registry, grace_seconds: float = 0.0
) -> ReadThroughCache[tuple[AdapterName, str], VersionRecord]:
    """Caches the version of an adapter and an alias or version prefix."""
    return ReadThroughCache(registry, lambda session, key: adapters.resolve(session, *key), grace_seconds=grace_seconds)
