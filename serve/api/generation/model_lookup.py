"""From the `model` of a request to what answers it: authorized first, then looked up, then pinned."""

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
    """What answers a request, from admission to its last token, whatever is promoted meanwhile.

    Attributes:
        model: the name as the caller wrote it.
        served: the base, and what generates with it.
        tenant: whom the work is counted to.
        version: the adapter's version; None: the base alone.
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
        """The base's or the adapter's name, without what follows an `@`."""
        return self.model.partition("@")[0]

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the response."""
        return {"x-loramill-version": self.version} if self.version else {}


async def find_model(gateway: Gateway, caller: Caller, text: str) -> Target:
    """Resolves a model's name; what another gateway promotes is seen within half a second.

    Raises:
        Forbidden: another tenant's adapter, whether it exists or not.
        ModelNotFound: no such base, adapter, alias or version.
    """
    name = ModelName.parse(text)
    if name.adapter is None:
        served = gateway.served.get(name.base or "")
        if served is None:
            bases = ", ".join(f"'{base}'" for base in gateway.served)
            raise ModelNotFound(
                f"The model '{text}' does not exist. Bases here: {bases}; adapters are tenant/adapter.", param="model"
            )
        fingerprint = served.base.fingerprint[:SHORT_HASH_LENGTH]
        return Target(text, served, caller.tenant or "", None, base_created_at(served.base), fingerprint)
    caller.check_adapter(name.adapter.tenant)
    version = await gateway.version_cache.get((name.adapter, name.selector))
    served = next((each for each in gateway.served.values() if each.base.fingerprint == version.base), None)
    if served is None:
        raise ModelNotFound(f"The model '{text}' was trained on a base that isn't served here.", param="model")
    fingerprint = f"{version.base[:SHORT_HASH_LENGTH]}-{version.id[:SHORT_HASH_LENGTH]}"
    return Target(text, served, caller.tenant or name.adapter.tenant, version.id, version.created_at, fingerprint)


@lru_cache
def base_created_at(base: Base) -> float:
    """When a base was created, in seconds since the epoch: the time of its config.json, else now."""
    try:
        return (base.folder / "config.json").stat().st_mtime
    except OSError:
        return time.time()


def version_cache(
    registry: Registry, grace_seconds: float = 0.0
) -> ReadThroughCache[tuple[AdapterName, str], VersionRecord]:
    """The version of an adapter's alias or a version's prefix; while the database is away, at most `grace` old."""
    return ReadThroughCache(
        registry, lambda session, asked: adapters.resolve(session, *asked), grace_seconds=grace_seconds
    )
