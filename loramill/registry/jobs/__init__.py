"""The job queue: jobs, leases, fair shares, worker slots, checkpoints and results."""

from loramill.registry.jobs.jobs import (
    add_event,
    cancel,
    get,
    list_by_metadata,
    list_events,
    list_jobs,
    pause,
    preempt,
    resume,
    retry,
    submit,
)
from loramill.registry.jobs.leases import JobProgress, fail, heartbeat, lease, publish, reclaim_expired, release
from loramill.registry.jobs.queue import count_open

__all__ = [
    "JobProgress",
    "add_event",
    "cancel",
    "count_open",
    "fail",
    "get",
    "heartbeat",
    "lease",
    "list_by_metadata",
    "list_events",
    "list_jobs",
    "pause",
    "preempt",
    "publish",
    "reclaim_expired",
    "release",
    "resume",
    "retry",
    "submit",
]
