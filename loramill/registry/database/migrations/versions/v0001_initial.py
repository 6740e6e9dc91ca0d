"""The first tables of the record."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision: str | None = None


def upgrade() -> None:
    op.create_table(
        "tenants",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_tenants"),
        sa.UniqueConstraint("name", name="uq_tenants_name"),
    )
    op.create_table(
        "api_keys",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("tenant", sa.String(), nullable=True),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("hint", sa.String(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("revoked_at", sa.Double(), nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_api_keys"),
        sa.UniqueConstraint("digest", name="uq_api_keys_digest"),
        sa.ForeignKeyConstraint(["tenant"], ["tenants.name"], name="fk_api_keys_tenant"),
    )
    op.create_index("ix_api_keys_tenant", "api_keys", ["tenant"])
    _create_data_and_jobs()
    _create_adapters()
    _create_nights()


def _create_data_and_jobs() -> None:
    op.create_table(
        "datasets",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("tenant", sa.String(), nullable=False),
        sa.Column("filename", sa.String(), nullable=False),
        sa.Column("artifact", sa.String(64), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("examples", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_datasets"),
        sa.ForeignKeyConstraint(["tenant"], ["tenants.name"], name="fk_datasets_tenant"),
    )
    op.create_index("ix_datasets_tenant_created_at", "datasets", ["tenant", "created_at"])
    op.create_table(
        "jobs",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("tenant", sa.String(), nullable=False),
        sa.Column("spec", sa.JSON(), nullable=False),
        sa.Column("status", sa.String(32), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("returned", sa.Integer(), nullable=False),
        sa.Column("max_attempts", sa.Integer(), nullable=True),
        sa.Column("owner", sa.String(), nullable=True),
        sa.Column("lease_until", sa.Double(), nullable=True),
        sa.Column("cancel_requested", sa.Boolean(), nullable=False),
        sa.Column("step", sa.Integer(), nullable=False),
        sa.Column("trained_tokens", sa.BigInteger(), nullable=False),
        sa.Column("version", sa.String(64), nullable=True),
        sa.Column("error_code", sa.String(), nullable=True),
        sa.Column("error_message", sa.String(), nullable=True),
        sa.Column("metadata", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("started_at", sa.Double(), nullable=True),
        sa.Column("finished_at", sa.Double(), nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_jobs"),
        sa.ForeignKeyConstraint(["tenant"], ["tenants.name"], name="fk_jobs_tenant"),
    )
    op.create_index("ix_jobs_tenant_created_at", "jobs", ["tenant", "created_at"])
    op.create_index("ix_jobs_status_created_at", "jobs", ["status", "created_at"])
    op.create_table(
        "job_events",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("job", sa.String(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("level", sa.String(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("message", sa.String(), nullable=False),
        sa.Column("data", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_job_events"),
        sa.ForeignKeyConstraint(["job"], ["jobs.id"], name="fk_job_events_job"),
    )
    op.create_index("ix_job_events_job_id", "job_events", ["job", "id"])


def _create_adapters() -> None:
    op.create_table(
        "adapters",
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("tenant", sa.String(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_adapters"),
        sa.ForeignKeyConstraint(["tenant"], ["tenants.name"], name="fk_adapters_tenant"),
    )
    op.create_index("ix_adapters_tenant", "adapters", ["tenant"])
    op.create_table(
        "versions",
        sa.Column("adapter", sa.String(), nullable=False),
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("job", sa.String(), nullable=True),
        sa.Column("base", sa.String(64), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("adapter", "id", name="pk_versions"),
        sa.ForeignKeyConstraint(["adapter"], ["adapters.name"], name="fk_versions_adapter"),
        sa.ForeignKeyConstraint(["job"], ["jobs.id"], name="fk_versions_job"),
    )
    op.create_index("ix_versions_id", "versions", ["id"])
    op.create_table(
        "aliases",
        sa.Column("adapter", sa.String(), nullable=False),
        sa.Column("alias", sa.String(32), nullable=False),
        sa.Column("version", sa.String(64), nullable=False),
        sa.PrimaryKeyConstraint("adapter", "alias", name="pk_aliases"),
        sa.ForeignKeyConstraint(["adapter"], ["adapters.name"], name="fk_aliases_adapter"),
        _version_of_adapter("aliases"),
    )
    op.create_table(
        "alias_changes",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("adapter", sa.String(), nullable=False),
        sa.Column("alias", sa.String(32), nullable=False),
        sa.Column("version", sa.String(64), nullable=True),
        sa.Column("reason", sa.String(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_alias_changes"),
        sa.ForeignKeyConstraint(["adapter"], ["adapters.name"], name="fk_alias_changes_adapter"),
        _version_of_adapter("alias_changes"),
    )
    op.create_index("ix_alias_changes_adapter_id", "alias_changes", ["adapter", "id"])
    op.create_table(
        "evaluations",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("adapter", sa.String(), nullable=False),
        sa.Column("version", sa.String(64), nullable=True),
        sa.Column("dataset", sa.String(), nullable=False),
        sa.Column("slice", sa.String(), nullable=False),
        sa.Column("examples", sa.Integer(), nullable=False),
        sa.Column("metrics", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_evaluations"),
        sa.ForeignKeyConstraint(["adapter"], ["adapters.name"], name="fk_evaluations_adapter"),
        _version_of_adapter("evaluations"),
    )
    op.create_index("ix_evaluations_adapter_id", "evaluations", ["adapter", "id"])


def _version_of_adapter(table: str) -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint(
        ["adapter", "version"], ["versions.adapter", "versions.id"], name=f"fk_{table}_adapter_version"
    )


def _create_nights() -> None:
    op.create_table(
        "nightly_runs",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("open", sa.Boolean(), nullable=True),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("finished_at", sa.Double(), nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_nightly_runs"),
        sa.UniqueConstraint("open", name="uq_nightly_runs_open"),
    )
    op.create_table(
        "nightly_steps",
        sa.Column("run", sa.String(), nullable=False),
        sa.Column("adapter", sa.String(), nullable=False),
        sa.Column("step", sa.String(), nullable=False),
        sa.Column("status", sa.String(32), nullable=False),
        sa.Column("result", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("finished_at", sa.Double(), nullable=True),
        sa.PrimaryKeyConstraint("run", "adapter", "step", name="pk_nightly_steps"),
        sa.ForeignKeyConstraint(["run"], ["nightly_runs.id"], name="fk_nightly_steps_run"),
        sa.ForeignKeyConstraint(["adapter"], ["adapters.name"], name="fk_nightly_steps_adapter"),
    )
    op.create_table(
        "adapter_data",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("adapter", sa.String(), nullable=False),
        sa.Column("train", sa.String(), nullable=False),
        sa.Column("valid", sa.String(), nullable=True),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("run", sa.String(), nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_adapter_data"),
        sa.ForeignKeyConstraint(["adapter"], ["adapters.name"], name="fk_adapter_data_adapter"),
        sa.ForeignKeyConstraint(["train"], ["datasets.id"], name="fk_adapter_data_train"),
        sa.ForeignKeyConstraint(["valid"], ["datasets.id"], name="fk_adapter_data_valid"),
        sa.ForeignKeyConstraint(["run"], ["nightly_runs.id"], name="fk_adapter_data_run"),
    )
    op.create_index("ix_adapter_data_run_adapter", "adapter_data", ["run", "adapter"])
