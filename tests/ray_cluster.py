"""A Ray cluster in the process of a test."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray


@contextmanager
def ray_cluster(**options: Any) -> Iterator[None]:
    """Starts a cluster for the block; `options` are those of `ray.init`."""
    # A process that has used Ray with tokens waits forever for answers of a cluster without, and the other way round.
    # Workers run at normal priority, as in `loramill up`: at Ray's niceness of 15 they would get 3% of a core next to
    # any other busy process.
    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_worker_niceness": "0"}
    ray.init(address="local", include_dashboard=False, object_store_memory=128 << 20, log_to_driver=False, **options)
    try:
        yield
    finally:
        ray.shutdown()
