"""Nightly steps that wait for a person."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0019"
down_revision: str | None = "0018"


def upgrade() -> None:
    op.add_column("nightly_steps", sa.Column("waits", sa.Boolean(), nullable=True))
    op.create_index("ix_nightly_steps_waits", "nightly_steps", ["waits", "adapter"], unique=True)
