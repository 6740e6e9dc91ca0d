"""Rollouts of adapters, and the traffic of the versions that they compare."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0015"
down_revision: str | None = "0014"


def upgrade() -> None:
    op.create_table(
        "rollouts",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("adapter", sa.String(), nullable=False),
        sa.Column("open", sa.Boolean(), nullable=True),
        sa.Column("kind", sa.String(32), nullable=False),
        sa.Column("version", sa.String(64), nullable=False),
        sa.Column("baseline", sa.String(64), nullable=True),
        sa.Column("share", sa.Double(), nullable=False),
        sa.Column("run", sa.String(), nullable=True),
        sa.Column("policy", sa.JSON(), nullable=False),
        sa.Column("started_at", sa.Double(), nullable=False),
        sa.Column("ends_at", sa.Double(), nullable=True),
        sa.Column("ended_at", sa.Double(), nullable=True),
        sa.Column("outcome", sa.String(32), nullable=True),
        sa.Column("reason", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(["adapter"], ["adapters.name"], name="fk_rollouts_adapter"),
        sa.ForeignKeyConstraint(["run"], ["nightly_runs.id"], name="fk_rollouts_run"),
        sa.PrimaryKeyConstraint("id", name="pk_rollouts"),
        sa.UniqueConstraint("adapter", "open", name="uq_rollouts_adapter_open"),
    )
    op.create_index("ix_rollouts_adapter_id", "rollouts", ["adapter", "id"])
    op.create_table(
        "version_traffic",
        sa.Column("adapter", sa.String(), nullable=False),
        sa.Column("version", sa.String(64), nullable=False),
        sa.Column("period", sa.BigInteger(), nullable=False),
        sa.Column("gateway", sa.String(), nullable=False),
        *(
            sa.Column(name, sa.BigInteger(), nullable=False)
            for name in ("requests", "errors", "empty", "cut", "good", "bad")
        ),
        sa.Column("first_token_seconds", sa.Double(), nullable=False),
        sa.Column("total_seconds", sa.Double(), nullable=False),
        sa.Column("first_token_histogram", sa.JSON(), nullable=False),
        sa.Column("total_histogram", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("adapter", "version", "period", "gateway", name="pk_version_traffic"),
    )
    op.create_index("ix_version_traffic_period", "version_traffic", ["period"])
