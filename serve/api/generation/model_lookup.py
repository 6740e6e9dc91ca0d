"""Resolves the `model` of a request: authorizes, looks up, and pins the version."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import lru_cache

from sqlalchemy.orm import Session

from loramill.errors import ModelNotFound
from loramill.models.catalog import Base
from loramill.names import SHORT_HASH_LENGTH, AdapterName, ModelName
from loramill.registry import Registry, adapters
from loramill.registry.rollouts import records as rollouts
from loramill.serve.api.cache import ReadThroughCache
from loramill.serve.api.dependencies import AdapterRoute, Gateway, ServedBase
from loramill.serve.api.middleware.authentication import Caller
from loramill.serve.routing.canary import in_share
from loramill.types import Alias, RolloutKind, RolloutRecord, VersionRecord


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
        by_default: whether the name is an adapter's without a version, so that its answers count in rollouts.
        shadow: the rollout whose version answers copies of a share of the requests; None: no version does.
    """

    model: str
    served: ServedBase
    tenant: str
    version: str | None
    created_at: float
    fingerprint: str
    by_default: bool = False
    shadow: RolloutRecord | None = None

    @property
    def name(self) -> str:
        """Name of the base or the adapter, without the `@` and what follows."""
        return self.model.partition("@")[0]

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the response."""
        return {"x-loramill-version": self.version} if self.version else {}


async def find_model(gateway: Gateway, caller: Caller, text: str, user: str | None = None) -> Target:
    """Resolves a model's name. Promotions and canaries by another gateway are seen within half a second.

    Args:
        gateway: the gateway.
        caller: who uses the model.
        text: the model's name. With an alias or version after an `@`, no canary changes it.
        user: who the answer is for, see `sticky_key`; None: the champion answers, also during a canary.

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
    by_default, shadow = "@" not in text, None
    if by_default:
        route = await gateway.routes.get(name.adapter)
        version = _choose_version(gateway, route, user)
        shadow = _shadow(gateway, route)
    else:
        version = await gateway.version_cache.get((name.adapter, name.selector))
    served = _served(gateway, version)
    if served is None:
        raise ModelNotFound(f"The model '{text}' was trained on a base that is not served here.", param="model")
    fingerprint = f"{version.base[:SHORT_HASH_LENGTH]}-{version.id[:SHORT_HASH_LENGTH]}"
    tenant = caller.tenant or name.adapter.tenant
    return Target(text, served, tenant, version.id, version.created_at, fingerprint, by_default, shadow)


def sticky_key(caller: Caller, user: str | None) -> str:
    """Returns what identifies the user of a request: its `user`, or else its API key."""
    return f"user {user}" if user else f"key {caller.key_id}"


def _choose_version(gateway: Gateway, route: AdapterRoute, user: str | None) -> VersionRecord:
    challenger, rollout = route.challenger, route.rollout
    if user is None or challenger is None or rollout is None or rollout.kind is not RolloutKind.CANARY:
        return route.champion
    chosen = in_share(rollout, user) and _served(gateway, challenger) is not None
    return challenger if chosen else route.champion


def _shadow(gateway: Gateway, route: AdapterRoute) -> RolloutRecord | None:
    """The rollout whose challenger gets copies: it has to be of the champion's base, which tokenizes the request."""
    challenger, rollout = route.challenger, route.rollout
    if challenger is None or rollout is None or rollout.kind is not RolloutKind.SHADOW:
        return None
    return rollout if challenger.base == route.champion.base else None


def _served(gateway: Gateway, version: VersionRecord) -> ServedBase | None:
    return next((each for each in gateway.served.values() if each.base.fingerprint == version.base), None)


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


def route_cache(registry: Registry, grace_seconds: float = 0.0) -> ReadThroughCache[AdapterName, AdapterRoute]:
    """Caches which versions of an adapter answer requests that name no version."""
    return ReadThroughCache(registry, _read_route, grace_seconds=grace_seconds)


def _read_route(session: Session, name: AdapterName) -> AdapterRoute:
    champion = adapters.resolve(session, name, Alias.CHAMPION)
    rollout = rollouts.find_open(session, name)
    if rollout is None or rollout.kind is RolloutKind.WATCH:
        return AdapterRoute(champion)
    return AdapterRoute(champion, rollout, adapters.resolve(session, name, rollout.version))
