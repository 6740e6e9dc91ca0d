"""What the scan of a nightly run's sources found."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision: str | None = "0013"


def upgrade() -> None:
    op.add_column("nightly_runs", sa.Column("sources", sa.JSON()))
