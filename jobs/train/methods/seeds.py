"""Randomness that is a function of words alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def seed_of(*keys: object) -> int:
    """A seed, 64 bits, for `words`."""
    return int.from_bytes(hashlib.sha256(repr(keys).encode()).digest()[:8], "little", signed=True)


@contextmanager
def seeded(device: torch.device, *keys: object) -> Iterator[None]:
    """Torch's global generators begin inside where `words` say, and are outside as if nothing had been drawn."""
    with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device], device_type="cuda"):
        torch.manual_seed(seed_of(*keys))
        yield
