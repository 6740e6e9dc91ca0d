"""The job queue: jobs, leases, fair shares, worker slots, and what a job leaves behind."""

from loramill.registry.jobs.jobs import (
    add_event,
    cancel,
    events,
    get,
    labelled,
    list_of,
    pause,
    preempt,
    resume,
    retry,
    submit,
)
from loramill.registry.jobs.leases import fail, heartbeat, lease, publish, release, settle_lost
from loramill.registry.jobs.queue import count_open

__all__ = [
    "add_event",
    "cancel",
    "count_open",
    "events",
    "fail",
    "get",
    "heartbeat",
    "labelled",
    "lease",
    "list_of",
    "pause",
    "preempt",
    "publish",
    "release",
    "resume",
    "retry",
    "settle_lost",
    "submit",
]
