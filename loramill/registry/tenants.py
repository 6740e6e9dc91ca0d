"""Tenants: the owners of everything else."""

from __future__ import annotations

import time

from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from loramill.errors import Conflict, NotFound
from loramill.names import check_name
from loramill.registry.tables import TenantRow
from loramill.types import TenantRecord


def create(session: Session, name: str) -> TenantRecord:
    """Adds a tenant.

    Raises:
        InvalidRequest: the name can't be a tenant's.
        Conflict: there is one of this name.
    """
    row = TenantRow(name=check_name(name, "tenant"), created_at=time.time())
    try:
        with session.begin_nested():
            session.add(row)
    except IntegrityError as error:
        raise Conflict(f"There is a tenant '{name}' already.", param="name") from error
    return TenantRecord.model_validate(row)


def get(session: Session, name: str) -> TenantRecord:
    """The tenant of this name.

    Raises:
        NotFound: there is none.
    """
    row = session.scalar(select(TenantRow).where(TenantRow.name == name))
    if row is None:
        raise NotFound(f"There is no tenant '{name}'.", param="tenant")
    return TenantRecord.model_validate(row)


def list_all(session: Session) -> list[TenantRecord]:
    """All tenants, by name."""
    return [TenantRecord.model_validate(row) for row in session.scalars(select(TenantRow).order_by(TenantRow.name))]
