"""Stored completions, their feedback, and the consent of tenants."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision: str | None = "0011"


def upgrade() -> None:
    op.add_column("tenants", sa.Column("store_completions", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.add_column("tenants", sa.Column("completion_days", sa.Double()))
    op.create_table(
        "completions",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("kind", sa.String(32), nullable=False),
        sa.Column("tenant", sa.String(), nullable=False),
        sa.Column("adapter", sa.String()),
        sa.Column("version", sa.String(64)),
        sa.Column("model", sa.String(), nullable=False),
        sa.Column("user", sa.String()),
        sa.Column("metadata", sa.JSON(), nullable=False),
        sa.Column("request", sa.JSON(), nullable=False),
        sa.Column("response", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_completions"),
        sa.ForeignKeyConstraint(["tenant"], ["tenants.name"], name="fk_completions_tenant"),
        sa.ForeignKeyConstraint(["adapter"], ["adapters.name"], name="fk_completions_adapter"),
    )
    op.create_index("ix_completions_tenant_created_at", "completions", ["tenant", "created_at"])
    op.create_index("ix_completions_tenant_user", "completions", ["tenant", "user"])
    op.create_index("ix_completions_adapter", "completions", ["adapter"])
    op.create_table(
        "feedback",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("tenant", sa.String(), nullable=False),
        sa.Column("completion", sa.String(), nullable=False),
        sa.Column("choice", sa.Integer(), nullable=False),
        sa.Column("rating", sa.String(32)),
        sa.Column("correction", sa.String()),
        sa.Column("reason", sa.String()),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("updated_at", sa.Double(), nullable=False),
        sa.Column("example_used_at", sa.Double()),
        sa.Column("example_file", sa.String()),
        sa.Column("pair_used_at", sa.Double()),
        sa.Column("pair_file", sa.String()),
        sa.PrimaryKeyConstraint("id", name="pk_feedback"),
        sa.ForeignKeyConstraint(["tenant"], ["tenants.name"], name="fk_feedback_tenant"),
        sa.ForeignKeyConstraint(["completion"], ["completions.id"], name="fk_feedback_completion", ondelete="CASCADE"),
    )
    op.create_index("ix_feedback_tenant_created_at", "feedback", ["tenant", "created_at"])
    op.create_index("ix_feedback_completion_choice", "feedback", ["completion", "choice"], unique=True)
