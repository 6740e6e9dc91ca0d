"""Scheduled times of nightly runs, and the lease of the process that works on a run."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision: str | None = "0012"


def upgrade() -> None:
    op.add_column("nightly_runs", sa.Column("holder", sa.String()))
    op.add_column("nightly_runs", sa.Column("lease_until", sa.Double()))
    op.create_table(
        "nightly_times",
        sa.Column("scheduled_at", sa.Double(), nullable=False),
        sa.Column("schedule", sa.String(), nullable=False),
        sa.Column("missed", sa.Integer(), nullable=False),
        sa.Column("run", sa.String()),
        sa.ForeignKeyConstraint(["run"], ["nightly_runs.id"], name="fk_nightly_times_run"),
        sa.PrimaryKeyConstraint("scheduled_at", name="pk_nightly_times"),
    )
