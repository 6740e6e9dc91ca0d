"""What jobs cost: how the time of sessions is divided among the jobs that they trained together. Pure functions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class JobInterval:
    """A time in which a session or a trainer held a job; times are seconds since the epoch.

    Attributes:
        devices: GPUs, or CPU threads, of the session or trainer.
    """

    job: str
    owner: str
    start: float
    end: float
    devices: float = 1.0


def shared_seconds(intervals: Sequence[JobInterval]) -> dict[str, float]:
    """GPU-seconds, or CPU-seconds, by job: at each instant, the jobs that a session holds have equal parts of it."""
    seconds: dict[str, float] = {each.job: 0.0 for each in intervals}
    by_owner: dict[str, list[JobInterval]] = defaultdict(list)
    for each in intervals:
        if each.end > each.start:
            by_owner[each.owner].append(each)
    for held in by_owner.values():
        for job, value in _of_owner(held).items():
            seconds[job] += value
    return seconds


def _of_owner(held: Sequence[JobInterval]) -> Mapping[str, float]:
    """The jobs' parts of one session's time: between two events, each job that is held has an equal part."""
    seconds: dict[str, float] = defaultdict(float)
    events = [(each.start, True, each) for each in held] + [(each.end, False, each) for each in held]
    running: list[JobInterval] = []
    since = 0.0
    for time, starts, each in sorted(events, key=lambda event: event[:2]):
        for other in running:
            seconds[other.job] += (time - since) * other.devices / len(running)
        since = time
        (running.append if starts else running.remove)(each)
    return seconds
