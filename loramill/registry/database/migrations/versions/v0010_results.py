"""The results per example that an evaluation was computed from."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision: str | None = "0009"


def upgrade() -> None:
    op.add_column("evaluations", sa.Column("results", sa.String(64)))
