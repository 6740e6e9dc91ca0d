"""Jobs whose session has other jobs, and jobs that need one for themselves."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision: str | None = "0007"


def upgrade() -> None:
    # Not in a batch, which for a default that is an expression makes the table anew: other tables refer to its rows.
    for name in ("shared", "alone"):
        op.add_column("jobs", sa.Column(name, sa.Boolean(), nullable=False, server_default=sa.false()))
