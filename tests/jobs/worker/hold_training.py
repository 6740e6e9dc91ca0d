"""Training that waits at a step, so that what a test does there meets it there."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from loramill.jobs.worker.lease import Lease


def hold_training(monkeypatch: pytest.MonkeyPatch, step: int, until: Callable[[Lease], bool]) -> None:
    """Training does not go past a step until a condition of its lease is met."""
    check = Lease.raise_if_stopped

    def held(lease: Lease) -> None:
        while lease.last_progress is not None and lease.last_progress.step >= step and not until(lease):
            time.sleep(0.01)
        check(lease)

    monkeypatch.setattr(Lease, "raise_if_stopped", held)


def stop_requested(lease: Lease) -> bool:
    """Whether a heartbeat has read that the job has to stop."""
    return lease._stop is not None
