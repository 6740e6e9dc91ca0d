"""Tables of gateways: usage and rate windows."""

from __future__ import annotations

from sqlalchemy import BigInteger, ForeignKey, String
from sqlalchemy.orm import Mapped, mapped_column

from loramill.registry.database.tables.base import TableBase


class UsageRow(TableBase):
    """Usage on one day. An empty tenant is an admin acting for no tenant, an empty version the base alone."""

    __tablename__ = "usage"
    tenant: Mapped[str] = mapped_column(primary_key=True)
    day: Mapped[str] = mapped_column(String(10), primary_key=True)
    model: Mapped[str] = mapped_column(primary_key=True)
    version: Mapped[str] = mapped_column(String(64), primary_key=True)
    requests: Mapped[int] = mapped_column(BigInteger)
    prompt_tokens: Mapped[int] = mapped_column(BigInteger)
    completion_tokens: Mapped[int] = mapped_column(BigInteger)


class GatewayRow(TableBase):
    """A gateway: when it last wrote its usage, and the number of the last batch that it wrote."""

    __tablename__ = "gateways"
    id: Mapped[str] = mapped_column(primary_key=True)
    last_seen_at: Mapped[float]
    last_batch: Mapped[int]


class RateWindowRow(TableBase):
    """Requests and tokens of a tenant with limits at one gateway, as in `RateWindow`."""

    __tablename__ = "rate_windows"
    gateway: Mapped[str] = mapped_column(ForeignKey("gateways.id"), primary_key=True)
    tenant: Mapped[str] = mapped_column(ForeignKey("tenants.name"), primary_key=True)
    minute: Mapped[int]
    requests: Mapped[int]
    previous_requests: Mapped[int]
    tokens: Mapped[int] = mapped_column(BigInteger)
    previous_tokens: Mapped[int] = mapped_column(BigInteger)
    running_requests: Mapped[int]
    reserved_tokens: Mapped[int] = mapped_column(BigInteger)
