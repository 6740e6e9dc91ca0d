"""What nightly runs train adapters on and hold out, and the files that their sources have seen."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision: str | None = "0010"


def upgrade() -> None:
    op.create_table(
        "adapter_content",
        sa.Column("adapter", sa.String(), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("side", sa.String(32), nullable=False),
        sa.Column("sketch", sa.LargeBinary(), nullable=False),
        sa.Column("dataset", sa.String(), nullable=False),
        sa.Column("run", sa.String()),
        sa.Column("imported", sa.Boolean(), server_default=sa.false(), nullable=False),
        sa.PrimaryKeyConstraint("adapter", "digest", name="pk_adapter_content"),
        sa.ForeignKeyConstraint(["adapter"], ["adapters.name"], name="fk_adapter_content_adapter"),
        sa.ForeignKeyConstraint(["run"], ["nightly_runs.id"], name="fk_adapter_content_run"),
    )
    op.create_index("ix_adapter_content_dataset", "adapter_content", ["dataset"])
    op.create_table(
        "source_files",
        sa.Column("adapter", sa.String(), nullable=False),
        sa.Column("url", sa.String(), nullable=False),
        sa.Column("tenant", sa.String(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("settled", sa.Boolean(), nullable=False),
        sa.Column("content", sa.String(64)),
        sa.Column("dataset", sa.String()),
        sa.Column("error", sa.String()),
        sa.Column("seen_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("adapter", "url", name="pk_source_files"),
        sa.ForeignKeyConstraint(["tenant"], ["tenants.name"], name="fk_source_files_tenant"),
    )
    op.create_index("ix_source_files_tenant", "source_files", ["tenant"])
