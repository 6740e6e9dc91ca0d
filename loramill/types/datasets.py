"""Datasets of tenants."""

from __future__ import annotations

from loramill.types.base import FrozenModel


class DatasetRecord(FrozenModel):
    """An immutable, validated file of a tenant's examples."""

    id: str
    tenant: str
    filename: str
    artifact: str
    bytes: int
    examples: int
    created_at: float
