"""Priorities, quotas and shares of the pool; pause and preemption; checkpoints."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision: str | None = "0001"


def upgrade() -> None:
    with op.batch_alter_table("tenants") as tenants:
        tenants.add_column(sa.Column("weight", sa.Double(), nullable=False, server_default="1"))
        tenants.add_column(sa.Column("max_running", sa.Integer()))
        tenants.add_column(sa.Column("max_queued", sa.Integer()))
        tenants.add_column(sa.Column("served", sa.Double(), nullable=False, server_default="0"))
    with op.batch_alter_table("jobs") as jobs:
        jobs.add_column(sa.Column("asked", sa.String(32)))
        jobs.add_column(sa.Column("priority", sa.Integer(), nullable=False, server_default="0"))
        jobs.add_column(sa.Column("executor", sa.String(32), nullable=False, server_default="session"))
        jobs.add_column(sa.Column("cost", sa.Double(), nullable=False, server_default="0"))
        jobs.add_column(sa.Column("not_before", sa.Double()))
        jobs.add_column(sa.Column("micro_tokens", sa.Integer()))
        jobs.add_column(sa.Column("lost_step", sa.Integer()))
        jobs.add_column(sa.Column("loss", sa.Double()))
        jobs.add_column(sa.Column("valid_loss", sa.Double()))
        jobs.add_column(sa.Column("tokens_per_second", sa.Double()))
        jobs.add_column(sa.Column("result", sa.String(64)))
    op.execute("UPDATE jobs SET asked = 'cancel' WHERE cancel_requested AND status = 'running'")
    with op.batch_alter_table("jobs") as jobs:
        jobs.drop_column("cancel_requested")
    op.drop_index("ix_jobs_status_created_at", "jobs")
    op.create_index("ix_jobs_tenant_status", "jobs", ["tenant", "status"])
    queue = ["status", "executor", "priority", "tenant", "created_at", "id", "not_before"]
    op.create_index("ix_jobs_queue", "jobs", queue)
    op.create_table(
        "places",
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("holder", sa.String(), nullable=False),
        sa.Column("until", sa.Double(), nullable=False),
        sa.Column("size", sa.Integer(), nullable=False),
        sa.Column("ending", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_places"),
    )
    op.create_table(
        "job_checkpoints",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("job", sa.String(), nullable=False),
        sa.Column("step", sa.Integer(), nullable=False),
        sa.Column("version", sa.String(64), nullable=True),
        sa.Column("metrics", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_job_checkpoints"),
        sa.ForeignKeyConstraint(["job"], ["jobs.id"], name="fk_job_checkpoints_job"),
    )
    op.create_index("ix_job_checkpoints_job_step", "job_checkpoints", ["job", "step"])
