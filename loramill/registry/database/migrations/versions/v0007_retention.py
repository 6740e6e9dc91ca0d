"""The retention of an adapter, and the versions that retention removed."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision: str | None = "0006"


def upgrade() -> None:
    with op.batch_alter_table("adapters") as adapters:
        adapters.add_column(sa.Column("retention", sa.JSON()))
    op.create_table(
        "pruned_versions",
        sa.Column("adapter", sa.String(), nullable=False),
        sa.Column("version", sa.String(64), nullable=False),
        sa.Column("reason", sa.String(), nullable=False),
        sa.Column("pruned_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("adapter", "version", name="pk_pruned_versions"),
        sa.ForeignKeyConstraint(["adapter"], ["adapters.name"], name="fk_pruned_versions_adapter"),
    )
    op.create_index("ix_pruned_versions_pruned_at", "pruned_versions", ["pruned_at"])
