"""Adapters, their versions and aliases."""

from __future__ import annotations

from enum import StrEnum

from pydantic import Field

from loramill.types.base import FrozenModel
from loramill.types.retention import RetentionPolicy


class Alias(StrEnum):
    """Names that move between the versions of an adapter."""

    CHAMPION = "champion"
    CHALLENGER = "challenger"
    PREVIOUS = "previous"


class AdapterRecord(FrozenModel):
    """An adapter with the versions that its aliases point to; the champion of a `pinned` adapter does not change."""

    name: str = Field(description="Name of the adapter, `tenant/adapter`.")
    tenant: str = Field(description="Tenant that owns the adapter.")
    created_at: float = Field(description="When it was created, in seconds since the epoch.")
    champion: str | None = Field(default=None, description="Version that answers by default.")
    challenger: str | None = Field(default=None, description="Version of the last nightly run, if it was not promoted.")
    previous: str | None = Field(default=None, description="Version that was the champion before.")
    pinned: bool = Field(default=False, description="Whether the champion is pinned.")
    retention: RetentionPolicy | None = Field(
        default=None, description="Retention of its versions. Null: that of the settings."
    )


class VersionRecord(FrozenModel):
    """The immutable result of a job; `id` is the hash of its content, which is also the name of its artifact."""

    id: str = Field(description="ID of the version: the hash of its content.")
    adapter: str = Field(description="Name of the adapter.")
    job: str | None = Field(description="ID of the job that made it. Null: it was imported.")
    base: str = Field(description="Fingerprint of the base model.")
    bytes: int = Field(description="Size of its files in bytes.")
    created_at: float = Field(description="When it was created, in seconds since the epoch.")


class AliasChange(FrozenModel):
    """One move of an alias; the newest one is where the alias points now."""

    alias: Alias = Field(description="The alias.")
    version: str | None = Field(description="Version that it points to since then. Null: none.")
    reason: str = Field(description="Why it was changed.")
    created_at: float = Field(description="When it was changed, in seconds since the epoch.")


class DeletionSummary(FrozenModel):
    """What was deleted together with an adapter, version or tenant."""

    versions: int = Field(default=0, description="Number of deleted versions.")
    jobs: int = Field(default=0, description="Number of deleted jobs.")
    files: int = Field(default=0, description="Number of deleted files.")
    cancelled: tuple[str, ...] = Field(default=(), description="IDs of the jobs that had not ended.")
