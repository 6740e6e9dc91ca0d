"""Tables of adapters: versions, aliases, evaluations and rollouts."""

from __future__ import annotations

from typing import Any

from sqlalchemy import JSON, BigInteger, ForeignKey, Index, String, UniqueConstraint, false
from sqlalchemy.orm import Mapped, mapped_column

from loramill.registry.database.tables.base import TableBase, text_enum, version_of_adapter
from loramill.types import Alias, RolloutKind, RolloutOutcome


class AdapterRow(TableBase):
    """A name that a tenant owns. The champion of a `pinned` adapter does not change.

    `retention` is a `RetentionPolicy`; null: that of the settings.
    """

    __tablename__ = "adapters"
    name: Mapped[str] = mapped_column(primary_key=True)
    tenant: Mapped[str] = mapped_column(ForeignKey("tenants.name"), index=True)
    created_at: Mapped[float]
    pinned: Mapped[bool] = mapped_column(default=False, server_default=false())
    retention: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))


class VersionRow(TableBase):
    """The result of a job. Two adapters can have the same content, hence the key of two columns."""

    __tablename__ = "versions"
    adapter: Mapped[str] = mapped_column(ForeignKey("adapters.name"), primary_key=True)
    id: Mapped[str] = mapped_column(String(64), primary_key=True, index=True)
    job: Mapped[str | None] = mapped_column(ForeignKey("jobs.id"))
    base: Mapped[str] = mapped_column(String(64))
    bytes: Mapped[int] = mapped_column(BigInteger)
    created_at: Mapped[float]


class PrunedVersionRow(TableBase):
    """A version that retention removed, so that its name is answered with the reason; its files stay for a while."""

    __tablename__ = "pruned_versions"
    adapter: Mapped[str] = mapped_column(ForeignKey("adapters.name"), primary_key=True)
    version: Mapped[str] = mapped_column(String(64), primary_key=True)
    reason: Mapped[str]
    pruned_at: Mapped[float] = mapped_column(index=True)


class AliasRow(TableBase):
    """The version that an alias points to; changed in the same transaction as its history."""

    __tablename__ = "aliases"
    __table_args__ = (version_of_adapter(),)
    adapter: Mapped[str] = mapped_column(ForeignKey("adapters.name"), primary_key=True)
    alias: Mapped[Alias] = mapped_column(text_enum(Alias), primary_key=True)
    version: Mapped[str] = mapped_column(String(64))


class AliasChangeRow(TableBase):
    """One move of an alias; the newest row is equal to the alias."""

    __tablename__ = "alias_changes"
    __table_args__ = (version_of_adapter(), Index(None, "adapter", "id"))
    id: Mapped[int] = mapped_column(primary_key=True)
    adapter: Mapped[str] = mapped_column(ForeignKey("adapters.name"))
    alias: Mapped[Alias] = mapped_column(text_enum(Alias))
    version: Mapped[str | None] = mapped_column(String(64))
    reason: Mapped[str]
    created_at: Mapped[float]


class EvaluationRow(TableBase):
    """Metrics of a version of an adapter, or of the base (`version` is null).

    `results` is the artifact with the results of each example, of all candidates of a nightly run.
    """

    __tablename__ = "evaluations"
    __table_args__ = (version_of_adapter(), Index(None, "adapter", "id"))
    id: Mapped[int] = mapped_column(primary_key=True)
    adapter: Mapped[str] = mapped_column(ForeignKey("adapters.name"))
    version: Mapped[str | None] = mapped_column(String(64))
    dataset: Mapped[str]
    slice: Mapped[str]
    examples: Mapped[int]
    metrics: Mapped[dict[str, float]]
    results: Mapped[str | None] = mapped_column(String(64))
    created_at: Mapped[float]


class RolloutRow(TableBase):
    """A canary, a shadow or a watch of an adapter, as in `RolloutRecord`.

    `open` is true or null, and unique per adapter, so that at most one is open. Versions may be deleted after its end.
    """

    __tablename__ = "rollouts"
    __table_args__ = (UniqueConstraint("adapter", "open"), Index(None, "adapter", "id"))
    id: Mapped[int] = mapped_column(primary_key=True)
    adapter: Mapped[str] = mapped_column(ForeignKey("adapters.name"))
    open: Mapped[bool | None]
    kind: Mapped[RolloutKind] = mapped_column(text_enum(RolloutKind))
    version: Mapped[str] = mapped_column(String(64))
    baseline: Mapped[str | None] = mapped_column(String(64))
    share: Mapped[float]
    run: Mapped[str | None] = mapped_column(ForeignKey("nightly_runs.id"))
    policy: Mapped[dict[str, Any]]
    started_at: Mapped[float]
    ends_at: Mapped[float | None]
    ended_at: Mapped[float | None]
    outcome: Mapped[RolloutOutcome | None] = mapped_column(text_enum(RolloutOutcome))
    reason: Mapped[str]


class VersionTrafficRow(TableBase):
    """What a version's answers were like in one period at one gateway, as in `TrafficCounts`.

    A gateway replaces its row by newer sums. Ratings have rows of their own, of the gateway "". There are no foreign
    keys, since a gateway may write what it has counted after the adapter was deleted; the clean-up removes that.
    """

    __tablename__ = "version_traffic"
    adapter: Mapped[str] = mapped_column(primary_key=True)
    version: Mapped[str] = mapped_column(String(64), primary_key=True)
    period: Mapped[int] = mapped_column(BigInteger, primary_key=True, index=True)
    gateway: Mapped[str] = mapped_column(primary_key=True)
    requests: Mapped[int] = mapped_column(BigInteger)
    errors: Mapped[int] = mapped_column(BigInteger)
    empty: Mapped[int] = mapped_column(BigInteger)
    cut: Mapped[int] = mapped_column(BigInteger)
    good: Mapped[int] = mapped_column(BigInteger)
    bad: Mapped[int] = mapped_column(BigInteger)
    total_histogram: Mapped[dict[str, Any]]
