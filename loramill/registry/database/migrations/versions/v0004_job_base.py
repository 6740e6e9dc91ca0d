"""The base of each job as a column, so that a pool takes its own jobs only; how far lost workers came at most."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision: str | None = "0003"

_QUEUE = ["status", "executor", "priority", "tenant", "created_at", "id", "not_before"]


def upgrade() -> None:
    with op.batch_alter_table("jobs") as jobs:
        jobs.add_column(sa.Column("base", sa.String(64)))
        jobs.add_column(sa.Column("furthest", sa.Integer()))
    base = "spec ->> 'base'" if op.get_bind().dialect.name == "postgresql" else "json_extract(spec, '$.base')"
    op.execute(f"UPDATE jobs SET base = {base}")
    op.drop_index("ix_jobs_queue", "jobs")
    op.create_index("ix_jobs_queue", "jobs", [*_QUEUE, "base"])
