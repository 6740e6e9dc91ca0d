"""Alembic's entry: runs the migrations on the connection that `loramill.registry.migrate` opened and will commit."""

from __future__ import annotations

from alembic import context

from loramill.registry.tables import Base

context.configure(connection=context.config.attributes["connection"], target_metadata=Base.metadata)
with context.begin_transaction():
    context.run_migrations()
