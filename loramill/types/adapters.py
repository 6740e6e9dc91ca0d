"""Adapters, their versions and aliases, and evaluations."""

from __future__ import annotations

from enum import StrEnum

from pydantic import Field

from loramill.types.base import FrozenModel


class Alias(StrEnum):
    """Names that move between the versions of an adapter."""

    CHAMPION = "champion"
    CHALLENGER = "challenger"
    PREVIOUS = "previous"


class AdapterRecord(FrozenModel):
    """An adapter with the versions that its aliases point to; the champion of a `pinned` adapter does not change."""

    name: str
    tenant: str
    created_at: float
    champion: str | None = None
    challenger: str | None = None
    previous: str | None = None
    pinned: bool = False


class VersionRecord(FrozenModel):
    """The immutable result of a job; `id` is the hash of its content, which is also the name of its artifact."""

    id: str
    adapter: str
    job: str | None
    base: str
    bytes: int
    created_at: float


class AliasChange(FrozenModel):
    """One move of an alias; the newest one is where the alias points now."""

    alias: Alias
    version: str | None
    reason: str
    created_at: float


class EvaluationRecord(FrozenModel):
    """Metrics of a version, or of the base (`version` is None), on one slice of held-out examples."""

    id: int
    adapter: str
    version: str | None
    dataset: str
    slice: str
    examples: int
    metrics: dict[str, float]
    created_at: float


class DeletionSummary(FrozenModel):
    """What was deleted together with an adapter, version or tenant."""

    versions: int = 0
    jobs: int = 0
    files: int = 0
    cancelled: tuple[str, ...] = Field(default=(), description="IDs of the jobs that had not ended.")
