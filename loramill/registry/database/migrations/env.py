"""Alembic's entry point: runs the migrations on the connection that `migrate.py` opened and commits."""

from __future__ import annotations

from alembic import context

from loramill.registry.database.tables import TableBase

context.configure(connection=context.config.attributes["connection"], target_metadata=TableBase.metadata)
with context.begin_transaction():
    context.run_migrations()
