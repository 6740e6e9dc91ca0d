"""Drops the times of answers that no rollout is decided by; the histogram of total times stays."""

from __future__ import annotations

from alembic import op

revision = "0018"
down_revision: str | None = "0017"


def upgrade() -> None:
    with op.batch_alter_table("version_traffic") as traffic:
        for name in ("first_token_seconds", "total_seconds", "first_token_histogram"):
            traffic.drop_column(name)
