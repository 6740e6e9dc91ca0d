"""How nightly.yaml lets a challenger that passed the gate take over. A pure function."""

from __future__ import annotations

from loramill.pipelines.nightly.definition.promotion import SHADOW_SHARE, CanaryDefinition, WatchDefinition
from loramill.types import Introduction, WatchLimits, WatchPolicy


def introduction(canary: CanaryDefinition, watch: WatchDefinition) -> Introduction:
    """The sections `canary` and `watch` of nightly.yaml as the registry stores and applies them."""
    limits = watch.model_dump(include=set(WatchLimits.model_fields))
    policy = WatchPolicy(window_seconds=watch.window.total_seconds(), **limits)
    share = SHADOW_SHARE if canary.shadow and not canary.share else canary.share
    return Introduction(share=share, shadow=canary.shadow, policy=policy)
