"""Randomness that is a function of its keys alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def seed_of(*keys: object) -> int:
    """Returns a seed of 64 bits for `keys`."""
    return int.from_bytes(hashlib.sha256(repr(keys).encode()).digest()[:8], "little", signed=True)


@contextmanager
def seeded(device: torch.device, *keys: object) -> Iterator[None]:
    """Within, torch's global generators are seeded by `keys`; afterwards their state is as before."""
    with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device], device_type="cuda"):
        torch.manual_seed(seed_of(*keys))
        yield
