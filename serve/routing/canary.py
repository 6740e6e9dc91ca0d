"""Which requests a canary's challenger answers: a pure function of the user, so that each gets one version."""

from __future__ import annotations

from hashlib import blake2b

from loramill.types import RolloutRecord


def in_share(rollout: RolloutRecord, key: str) -> bool:
    """Returns whether a key is in the share of a rollout.

    The keys of a smaller share are also in a larger one, so that no one changes sides when a share grows. Each version
    has a share of its own, so that it is not always the same users who try what is new.

    Args:
        rollout: an open rollout.
        key: what identifies the user, or whatever else is divided.
    """
    text = f"{rollout.adapter}\n{rollout.version}\n{key}".encode()
    return int.from_bytes(blake2b(text, digest_size=8).digest()) < rollout.share * 2**64
