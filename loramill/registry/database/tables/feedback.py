"""Tables of stored completions and feedback."""

from __future__ import annotations

from typing import Any

from sqlalchemy import BigInteger, ForeignKey, Index, String
from sqlalchemy.orm import Mapped, mapped_column

from loramill.registry.database.tables.base import TableBase, text_enum
from loramill.types import CompletionKind, Rating


class CompletionRow(TableBase):
    """A completion that its tenant stores: what was requested and answered, until its retention ends.

    `bytes` is its size as JSON, which counts toward its tenant's limit.
    """

    __tablename__ = "completions"
    __table_args__ = (Index(None, "tenant", "created_at"), Index(None, "tenant", "user"))
    id: Mapped[str] = mapped_column(primary_key=True)
    kind: Mapped[CompletionKind] = mapped_column(text_enum(CompletionKind))
    tenant: Mapped[str] = mapped_column(ForeignKey("tenants.name"))
    adapter: Mapped[str | None] = mapped_column(ForeignKey("adapters.name"), index=True)
    version: Mapped[str | None] = mapped_column(String(64))
    model: Mapped[str]
    user: Mapped[str | None]
    labels: Mapped[dict[str, str]] = mapped_column("metadata")
    request: Mapped[dict[str, Any]]
    response: Mapped[dict[str, Any]]
    bytes: Mapped[int] = mapped_column(BigInteger, default=0, server_default="0")
    created_at: Mapped[float]


class DeletedUserRow(TableBase):
    """A user of a tenant whose completions were deleted, so that gateways store none that ended before.

    `digest` is the SHA-256 of the tenant and the user.
    """

    __tablename__ = "deleted_users"
    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    tenant: Mapped[str] = mapped_column(ForeignKey("tenants.name"), index=True)
    deleted_at: Mapped[float]


class FeedbackRow(TableBase):
    """The rating and the correction of one answer of a stored completion, with which it is deleted.

    `…_used_at` is when a correction became an example, and a rating or a correction a part of a pair; `…_file` is the
    dataset that has it, and null if it was not valid.
    """

    __tablename__ = "feedback"
    __table_args__ = (Index(None, "tenant", "created_at"), Index(None, "completion", "choice", unique=True))
    id: Mapped[str] = mapped_column(primary_key=True)
    tenant: Mapped[str] = mapped_column(ForeignKey("tenants.name"))
    completion: Mapped[str] = mapped_column(ForeignKey("completions.id", ondelete="CASCADE"))
    choice: Mapped[int]
    rating: Mapped[Rating | None] = mapped_column(text_enum(Rating))
    correction: Mapped[str | None]
    reason: Mapped[str | None]
    created_at: Mapped[float]
    updated_at: Mapped[float]
    example_used_at: Mapped[float | None]
    example_file: Mapped[str | None]
    pair_used_at: Mapped[float | None]
    pair_file: Mapped[str | None]
