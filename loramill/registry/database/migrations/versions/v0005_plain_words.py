"""Tables and columns named as in the glossary; `learn` of stored job specs becomes `train_on`."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision: str | None = "0004"

_JOBS = sa.table("jobs", sa.column("id"), sa.column("spec", sa.JSON))
_STEPS = sa.table(
    "nightly_steps", sa.column("run"), sa.column("adapter"), sa.column("step"), sa.column("result", sa.JSON)
)


def upgrade() -> None:
    _rename_column("jobs", "asked", "pending_action")
    _rename_column("jobs", "furthest", "max_lost_step")
    _rename_column("gateways", "at", "last_seen_at")
    _rename_column("gateways", "page", "last_batch")
    _replace_places()
    _replace_meters()
    _rewrite_specs()


def _rename_column(table: str, old: str, new: str) -> None:
    # Not by Alembic's batch mode, which would copy the table and cannot drop one that others refer to.
    op.execute(f"ALTER TABLE {table} RENAME COLUMN {old} TO {new}")


def _replace_places() -> None:
    # A new table instead of a new name: SQLite cannot rename the primary key's constraint.
    op.create_table(
        "worker_slots",
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("holder", sa.String(), nullable=False),
        sa.Column("until", sa.Double(), nullable=False),
        sa.Column("size", sa.Integer(), nullable=False),
        sa.Column("ending", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_worker_slots"),
    )
    columns = "name, holder, until, size, ending"
    op.execute(f"INSERT INTO worker_slots ({columns}) SELECT {columns} FROM places")
    op.drop_table("places")


def _replace_meters() -> None:
    op.create_table(
        "rate_windows",
        sa.Column("gateway", sa.String(), nullable=False),
        sa.Column("tenant", sa.String(), nullable=False),
        sa.Column("minute", sa.Integer(), nullable=False),
        sa.Column("requests", sa.Integer(), nullable=False),
        sa.Column("previous_requests", sa.Integer(), nullable=False),
        sa.Column("tokens", sa.BigInteger(), nullable=False),
        sa.Column("previous_tokens", sa.BigInteger(), nullable=False),
        sa.Column("running_requests", sa.Integer(), nullable=False),
        sa.Column("reserved_tokens", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("gateway", "tenant", name="pk_rate_windows"),
        sa.ForeignKeyConstraint(["gateway"], ["gateways.id"], name="fk_rate_windows_gateway"),
        sa.ForeignKeyConstraint(["tenant"], ["tenants.name"], name="fk_rate_windows_tenant"),
    )
    op.execute(
        "INSERT INTO rate_windows (gateway, tenant, minute, requests, previous_requests, tokens, previous_tokens, "
        "running_requests, reserved_tokens) SELECT gateway, tenant, minute, requests, requests_before, tokens, "
        "tokens_before, running, reserved FROM meters"
    )
    op.drop_table("meters")


def _rewrite_specs() -> None:
    connection = op.get_bind()
    for id_, spec in connection.execute(sa.select(_JOBS.c.id, _JOBS.c.spec)).all():
        if "learn" in spec:
            connection.execute(_JOBS.update().where(_JOBS.c.id == id_).values(spec=_renamed(spec)))
    # The nightly pipeline's first step holds the spec that its run trains with.
    for run, adapter, step, result in connection.execute(sa.select(*_STEPS.c)).all():
        if "learn" in result.get("spec", {}):
            key = (_STEPS.c.run == run, _STEPS.c.adapter == adapter, _STEPS.c.step == step)
            new = {**result, "spec": _renamed(result["spec"])}
            connection.execute(_STEPS.update().where(*key).values(result=new))


def _renamed(spec: dict[str, Any]) -> dict[str, Any]:
    return {"train_on" if key == "learn" else key: value for key, value in spec.items()}
