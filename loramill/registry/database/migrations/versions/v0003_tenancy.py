"""Limits, scopes and expiry of keys, pins; usage, the gateways' books, and the audit."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision: str | None = "0002"


def upgrade() -> None:
    with op.batch_alter_table("tenants") as tenants:
        tenants.add_column(sa.Column("requests_per_minute", sa.Integer()))
        tenants.add_column(sa.Column("tokens_per_minute", sa.BigInteger()))
        tenants.add_column(sa.Column("concurrent_requests", sa.Integer()))
        tenants.add_column(sa.Column("stored_bytes", sa.BigInteger()))
    with op.batch_alter_table("api_keys") as keys:
        keys.add_column(sa.Column("expires_at", sa.Double()))
        scopes = "inference training adapters read"
        keys.add_column(sa.Column("scopes", sa.String(), nullable=False, server_default=scopes))
    with op.batch_alter_table("adapters") as adapters:
        adapters.add_column(sa.Column("pinned", sa.Boolean(), nullable=False, server_default=sa.false()))
    _create_books()
    _create_audit()


def _create_books() -> None:
    op.create_table(
        "usage",
        sa.Column("tenant", sa.String(), nullable=False),
        sa.Column("day", sa.String(10), nullable=False),
        sa.Column("model", sa.String(), nullable=False),
        sa.Column("version", sa.String(64), nullable=False),
        sa.Column("requests", sa.BigInteger(), nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger(), nullable=False),
        sa.Column("completion_tokens", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("tenant", "day", "model", "version", name="pk_usage"),
    )
    op.create_table(
        "gateways",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.Column("page", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_gateways"),
    )
    op.create_table(
        "meters",
        sa.Column("gateway", sa.String(), nullable=False),
        sa.Column("tenant", sa.String(), nullable=False),
        sa.Column("minute", sa.Integer(), nullable=False),
        sa.Column("requests", sa.Integer(), nullable=False),
        sa.Column("requests_before", sa.Integer(), nullable=False),
        sa.Column("tokens", sa.BigInteger(), nullable=False),
        sa.Column("tokens_before", sa.BigInteger(), nullable=False),
        sa.Column("running", sa.Integer(), nullable=False),
        sa.Column("reserved", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("gateway", "tenant", name="pk_meters"),
        sa.ForeignKeyConstraint(["gateway"], ["gateways.id"], name="fk_meters_gateway"),
        sa.ForeignKeyConstraint(["tenant"], ["tenants.name"], name="fk_meters_tenant"),
    )


def _create_audit() -> None:
    op.create_table(
        "audit",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("tenant", sa.String(), nullable=True),
        sa.Column("actor", sa.String(), nullable=True),
        sa.Column("key", sa.String(), nullable=False),
        sa.Column("action", sa.String(), nullable=False),
        sa.Column("subject", sa.String(), nullable=False),
        sa.Column("details", sa.JSON(), nullable=False),
        sa.Column("request", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_audit"),
        sa.ForeignKeyConstraint(["tenant"], ["tenants.name"], name="fk_audit_tenant"),
    )
    op.create_index("ix_audit_tenant_created_at", "audit", ["tenant", "created_at"])
    op.create_index("ix_audit_created_at", "audit", ["created_at"])
