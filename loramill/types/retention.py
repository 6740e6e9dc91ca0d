"""Retention: which versions the clean-up removes, and what it removed."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from loramill.types.base import FrozenModel


class RetentionPolicy(FrozenModel):
    """Which versions of an adapter the clean-up removes.

    A version is removed if it is neither one of the newest nor younger than the age, and nothing refers to it. Where
    only one of the two is set, it decides alone; where neither is set, everything is kept.
    """

    keep_versions: int | None = Field(
        default=None,
        ge=1,
        description="Number of an adapter's newest versions that are kept at any age. If it is unset, version_days "
        "alone decides.",
    )
    version_days: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="Age in days from which versions are removed. If it is unset, keep_versions alone "
        "decides; if both are, no version is removed.",
    )
    keep_checkpoints: int | None = Field(
        default=None,
        ge=1,
        le=3,
        description="Number of a job's newest checkpoints that are kept as versions at any age; a job has "
        "three at most. If it is unset, checkpoint_days alone decides.",
    )
    checkpoint_days: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="Age in days from which checkpoints' versions, and the training states of failed jobs, are "
        "removed. If it is unset, keep_checkpoints alone decides about versions, and training states are removed after "
        "7 days.",
    )


class Removal(FrozenModel):
    """A version that retention removes, or has removed."""

    adapter: str = Field(description="Name of the adapter.")
    version: str = Field(description="ID of the version.")
    kind: Literal["version", "checkpoint"] = Field(description="A version, or a job's checkpoint.")
    job: str | None = Field(description="ID of the job that made it. Null: it was imported, or its job was deleted.")
    bytes: int = Field(description="Size of its files in bytes.")
    created_at: float = Field(description="When it was created, in seconds since the epoch.")
    reason: str = Field(description="Why it is removed.")
