"""Answers that a nightly run has got and not used yet; sizes of stored completions, and whose were deleted."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0017"
down_revision: str | None = "0015"


def upgrade() -> None:
    op.create_table(
        "nightly_answers",
        sa.Column("run", sa.String(), nullable=False),
        sa.Column("adapter", sa.String(), nullable=False),
        sa.Column("question", sa.String(64), nullable=False),
        sa.Column("text", sa.String(), nullable=False),
        sa.Column("truncated", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("run", "adapter", "question", name="pk_nightly_answers"),
        sa.ForeignKeyConstraint(["run"], ["nightly_runs.id"], name="fk_nightly_answers_run"),
    )
    op.add_column("completions", sa.Column("bytes", sa.BigInteger(), nullable=False, server_default="0"))
    op.execute("UPDATE completions SET bytes = length(CAST(request AS TEXT)) + length(CAST(response AS TEXT))")
    op.create_table(
        "deleted_users",
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("tenant", sa.String(), nullable=False),
        sa.Column("deleted_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("digest", name="pk_deleted_users"),
        sa.ForeignKeyConstraint(["tenant"], ["tenants.name"], name="fk_deleted_users_tenant"),
    )
    op.create_index("ix_deleted_users_tenant", "deleted_users", ["tenant"])
