"""A challenger that passed the gate takes over: at once and watched, or after a canary or a shadow."""

from __future__ import annotations

from sqlalchemy.orm import Session

from loramill.names import AdapterName
from loramill.pipelines.nightly.definition.promotion import SHADOW_SHARE, CanaryDefinition, WatchDefinition
from loramill.registry import adapters
from loramill.registry.rollouts import moves
from loramill.types import RolloutKind, WatchLimits, WatchPolicy


def introduce(
    session: Session,
    name: AdapterName,
    version: str,
    *,
    canary: CanaryDefinition,
    watch: WatchDefinition,
    run: str,
    reason: str,
) -> RolloutKind | None:
    """Promotes a version, or starts its canary or shadow, at whose end `advance` promotes it or drops it.

    The first version of an adapter is its champion already, and has nothing to be compared with.

    Returns:
        What was started; None: the version was promoted, and is watched if `watch.window` is not 0.

    Raises:
        NotFound: the adapter or the version does not exist.
        Conflict: the adapter is pinned to another version.
    """
    policy = watch_policy(watch)
    if adapters.get(session, name).champion in (None, version) or not canary.starts:
        moves.promote_watched(session, name, version, reason, policy=policy, run=run)
        return None
    share = canary.share or SHADOW_SHARE
    started = moves.start_canary(
        session,
        name,
        share=share,
        shadow=canary.shadow,
        version=version,
        policy=policy,
        promote_at_end=True,
        run=run,
        reason=reason,
    )
    return started.kind


def watch_policy(watch: WatchDefinition) -> WatchPolicy:
    """The section `watch` of nightly.yaml as the registry stores it."""
    limits = watch.model_dump(include=set(WatchLimits.model_fields))
    return WatchPolicy(window_seconds=watch.window.total_seconds(), **limits)
