"""Tables of tenants: keys, files, and the audit of changes."""

from __future__ import annotations

from typing import Any

from sqlalchemy import BigInteger, ForeignKey, Index, String, false
from sqlalchemy.orm import Mapped, mapped_column

from loramill.registry.database.tables.base import TableBase
from loramill.types import Scope


class TenantRow(TableBase):
    """A tenant with its fair share and limits."""

    __tablename__ = "tenants"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    created_at: Mapped[float]
    weight: Mapped[float] = mapped_column(default=1.0, server_default="1")
    max_running: Mapped[int | None]
    max_queued: Mapped[int | None]
    requests_per_minute: Mapped[int | None]
    tokens_per_minute: Mapped[int | None] = mapped_column(BigInteger)
    concurrent_requests: Mapped[int | None]
    stored_bytes: Mapped[int | None] = mapped_column(BigInteger)
    store_completions: Mapped[bool] = mapped_column(default=False, server_default=false())
    completion_days: Mapped[float | None]
    #: Tokens leased to its jobs, divided by its weight; the tenant with the smallest value is next. See `fair_share`.
    served: Mapped[float] = mapped_column(default=0.0, server_default="0")


class KeyRow(TableBase):
    """An API key, with the SHA-256 of its secret but never the secret. Its scopes are separated by spaces."""

    __tablename__ = "api_keys"
    id: Mapped[str] = mapped_column(primary_key=True)
    tenant: Mapped[str | None] = mapped_column(ForeignKey("tenants.name"), index=True)
    digest: Mapped[str] = mapped_column(String(64), unique=True)
    hint: Mapped[str]
    created_at: Mapped[float]
    revoked_at: Mapped[float | None]
    expires_at: Mapped[float | None]
    scopes: Mapped[str] = mapped_column(server_default=" ".join(Scope))


class DatasetRow(TableBase):
    """A validated file of a tenant; its content is an artifact."""

    __tablename__ = "datasets"
    __table_args__ = (Index(None, "tenant", "created_at"),)
    id: Mapped[str] = mapped_column(primary_key=True)
    tenant: Mapped[str] = mapped_column(ForeignKey("tenants.name"))
    filename: Mapped[str]
    artifact: Mapped[str] = mapped_column(String(64))
    bytes: Mapped[int] = mapped_column(BigInteger)
    examples: Mapped[int]
    created_at: Mapped[float]


class AuditRow(TableBase):
    """One change through the API, written in the same transaction as the change."""

    __tablename__ = "audit"
    __table_args__ = (Index(None, "tenant", "created_at"), Index(None, "created_at"))
    id: Mapped[str] = mapped_column(primary_key=True)
    created_at: Mapped[float]
    tenant: Mapped[str | None] = mapped_column(ForeignKey("tenants.name"))
    actor: Mapped[str | None]
    key: Mapped[str]
    action: Mapped[str]
    subject: Mapped[str]
    details: Mapped[dict[str, Any]]
    request: Mapped[str]
