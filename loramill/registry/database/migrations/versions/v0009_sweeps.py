"""The candidates of a sweep, with what each has reached."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision: str | None = "0008"


def upgrade() -> None:
    op.add_column("jobs", sa.Column("sweep", sa.JSON()))
