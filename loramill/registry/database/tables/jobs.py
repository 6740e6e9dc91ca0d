"""Tables of fine-tune jobs and of the pool that runs them."""

from __future__ import annotations

from typing import Any

from sqlalchemy import BigInteger, ForeignKey, Index, String, false
from sqlalchemy.orm import Mapped, mapped_column

from loramill.registry.database.tables.base import TableBase, text_enum
from loramill.types import JobStatus


class JobRow(TableBase):
    """A fine-tune job.

    `attempt` counts leases and never decreases; `returned` counts leases that were given back. `cost` is the number of
    tokens that the job is expected to train on, in which its tenant's fair share is counted. `lost_step` is the step at
    which its worker was last lost, and `max_lost_step` the highest such step. `shared`: another job was in the session
    of its last attempt; `alone`: its next attempt has a session for itself. `base` is that of the spec, for queries.
    `sweep` lists the candidates of a sweep.
    """

    __tablename__ = "jobs"
    __table_args__ = (
        Index(None, "tenant", "created_at"),
        Index(None, "tenant", "status"),
        # Covers the choice of the next job: of thousands of queued jobs, only the chosen one is read from the table.
        Index("ix_jobs_queue", "status", "executor", "priority", "tenant", "created_at", "id", "not_before", "base"),
    )
    id: Mapped[str] = mapped_column(primary_key=True)
    tenant: Mapped[str] = mapped_column(ForeignKey("tenants.name"))
    spec: Mapped[dict[str, Any]]
    base: Mapped[str | None] = mapped_column(String(64))
    status: Mapped[JobStatus] = mapped_column(text_enum(JobStatus))
    attempt: Mapped[int] = mapped_column(default=0)
    returned: Mapped[int] = mapped_column(default=0)
    max_attempts: Mapped[int | None]
    owner: Mapped[str | None]
    lease_until: Mapped[float | None]
    pending_action: Mapped[str | None] = mapped_column(String(32))
    priority: Mapped[int] = mapped_column(default=0, server_default="0")
    executor: Mapped[str] = mapped_column(String(32), default="session", server_default="session")
    cost: Mapped[float] = mapped_column(default=0.0, server_default="0")
    not_before: Mapped[float | None]
    micro_tokens: Mapped[int | None]
    lost_step: Mapped[int | None]
    max_lost_step: Mapped[int | None]
    shared: Mapped[bool] = mapped_column(default=False, server_default=false())
    alone: Mapped[bool] = mapped_column(default=False, server_default=false())
    step: Mapped[int] = mapped_column(default=0)
    trained_tokens: Mapped[int] = mapped_column(BigInteger, default=0)
    loss: Mapped[float | None]
    valid_loss: Mapped[float | None]
    tokens_per_second: Mapped[float | None]
    version: Mapped[str | None] = mapped_column(String(64))
    result: Mapped[str | None] = mapped_column(String(64))
    error_code: Mapped[str | None]
    error_message: Mapped[str | None]
    labels: Mapped[dict[str, str]] = mapped_column("metadata")
    sweep: Mapped[list[dict[str, Any]] | None]
    created_at: Mapped[float]
    started_at: Mapped[float | None]
    finished_at: Mapped[float | None]


class CheckpointRow(TableBase):
    """A validated checkpoint of a job; its version is deleted when newer checkpoints replace it."""

    __tablename__ = "job_checkpoints"
    __table_args__ = (Index(None, "job", "step"),)
    id: Mapped[str] = mapped_column(primary_key=True)
    job: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    step: Mapped[int]
    version: Mapped[str | None] = mapped_column(String(64))
    metrics: Mapped[dict[str, float]]
    created_at: Mapped[float]


class WorkerSlotRow(TableBase):
    """A worker slot that a supervisor holds for a session or a dedicated trainer.

    A supervisor that disappears, together with its session, stops extending `until`. A session that is `ending` ends
    after its current job.
    """

    __tablename__ = "worker_slots"
    name: Mapped[str] = mapped_column(primary_key=True)
    holder: Mapped[str]
    until: Mapped[float]
    size: Mapped[int]
    ending: Mapped[bool]


class PoolGpuRow(TableBase):
    """A kind of GPU on which a session or a trainer has run, and when one last started there."""

    __tablename__ = "pool_gpus"
    name: Mapped[str] = mapped_column(primary_key=True)
    bytes: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    capability: Mapped[str]
    last_seen_at: Mapped[float]


class EventRow(TableBase):
    """One line of a job's history."""

    __tablename__ = "job_events"
    __table_args__ = (Index(None, "job", "id"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    job: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    created_at: Mapped[float]
    level: Mapped[str]
    kind: Mapped[str]
    message: Mapped[str]
    data: Mapped[dict[str, Any]]
