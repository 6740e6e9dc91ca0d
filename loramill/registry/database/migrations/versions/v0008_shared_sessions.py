"""Jobs whose session has other jobs, and jobs that need one for themselves."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision: str | None = "0007"


def upgrade() -> None:
    with op.batch_alter_table("jobs") as jobs:
        jobs.add_column(sa.Column("shared", sa.Boolean(), nullable=False, server_default=sa.false()))
        jobs.add_column(sa.Column("alone", sa.Boolean(), nullable=False, server_default=sa.false()))
