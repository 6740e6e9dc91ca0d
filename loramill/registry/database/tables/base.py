"""The base class of all tables, and what several of them share."""

from __future__ import annotations

from enum import Enum
from typing import Any

from sqlalchemy import JSON, Double, ForeignKeyConstraint, MetaData
from sqlalchemy import Enum as EnumType
from sqlalchemy.orm import DeclarativeBase


class TableBase(DeclarativeBase):
    """Base class of all tables."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {  # noqa: RUF012
        float: Double(),
        dict[str, Any]: JSON(),
        dict[str, str]: JSON(),
        dict[str, float]: JSON(),
        list[dict[str, Any]]: JSON(),
    }


def text_enum(enum: type[Enum]) -> EnumType:
    """The type of a column with the values of an enum: text, so that a new value needs no migration."""
    return EnumType(enum, native_enum=False, length=32, values_callable=lambda members: [m.value for m in members])


def version_of_adapter() -> ForeignKeyConstraint:
    """A key of the columns `adapter` and `version`, so that a row can't name a version of another adapter."""
    return ForeignKeyConstraint(["adapter", "version"], ["versions.adapter", "versions.id"])
