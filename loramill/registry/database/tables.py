"""The registry's tables.

Tenants, adapters and versions are identified by their names in the API, and datasets, jobs and keys by their IDs. Times
are seconds since the epoch. A change here needs a migration; a test compares the two.
"""

from __future__ import annotations

from enum import Enum
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Double,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    MetaData,
    String,
    UniqueConstraint,
    false,
)
from sqlalchemy import Enum as EnumType
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from loramill.types import (
    Alias,
    CompletionKind,
    ContentSide,
    JobStatus,
    Rating,
    RolloutKind,
    RolloutOutcome,
    Scope,
    StepStatus,
)


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


def _text_enum(enum: type[Enum]) -> EnumType:
    # Text instead of a database enum, so that a new value needs no migration.
    return EnumType(enum, native_enum=False, length=32, values_callable=lambda members: [m.value for m in members])


def _version_of_adapter() -> ForeignKeyConstraint:
    # Two columns, so that an alias can never point to a version of another adapter.
    return ForeignKeyConstraint(["adapter", "version"], ["versions.adapter", "versions.id"])


class TenantRow(TableBase):
    """A tenant with its fair share and limits."""

    __tablename__ = "tenants"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    created_at: Mapped[float]
    weight: Mapped[float] = mapped_column(default=1.0, server_default="1")
    max_running: Mapped[int | None]
    max_queued: Mapped[int | None]
    requests_per_minute: Mapped[int | None]
    tokens_per_minute: Mapped[int | None] = mapped_column(BigInteger)
    concurrent_requests: Mapped[int | None]
    stored_bytes: Mapped[int | None] = mapped_column(BigInteger)
    store_completions: Mapped[bool] = mapped_column(default=False, server_default=false())
    completion_days: Mapped[float | None]
    #: Tokens leased to its jobs, divided by its weight; the tenant with the smallest value is next. See `fair_share`.
    served: Mapped[float] = mapped_column(default=0.0, server_default="0")


class KeyRow(TableBase):
    """An API key, with the SHA-256 of its secret but never the secret. Its scopes are separated by spaces."""

    __tablename__ = "api_keys"
    id: Mapped[str] = mapped_column(primary_key=True)
    tenant: Mapped[str | None] = mapped_column(ForeignKey("tenants.name"), index=True)
    digest: Mapped[str] = mapped_column(String(64), unique=True)
    hint: Mapped[str]
    created_at: Mapped[float]
    revoked_at: Mapped[float | None]
    expires_at: Mapped[float | None]
    scopes: Mapped[str] = mapped_column(server_default=" ".join(Scope))


class DatasetRow(TableBase):
    """A validated file of a tenant; its content is an artifact."""

    __tablename__ = "datasets"
    __table_args__ = (Index(None, "tenant", "created_at"),)
    id: Mapped[str] = mapped_column(primary_key=True)
    tenant: Mapped[str] = mapped_column(ForeignKey("tenants.name"))
    filename: Mapped[str]
    artifact: Mapped[str] = mapped_column(String(64))
    bytes: Mapped[int] = mapped_column(BigInteger)
    examples: Mapped[int]
    created_at: Mapped[float]


class JobRow(TableBase):
    """A fine-tune job.

    `attempt` counts leases and never decreases; `returned` counts leases that were given back. `cost` is the number of
    tokens that the job is expected to train on, in which its tenant's fair share is counted. `lost_step` is the step at
    which its worker was last lost, and `max_lost_step` the highest such step. `shared`: another job was in the session
    of its last attempt; `alone`: its next attempt has a session for itself. `base` is that of the spec, for queries.
    `sweep` lists the candidates of a sweep.
    """

    __tablename__ = "jobs"
    __table_args__ = (
        Index(None, "tenant", "created_at"),
        Index(None, "tenant", "status"),
        # Covers the choice of the next job: of thousands of queued jobs, only the chosen one is read from the table.
        Index("ix_jobs_queue", "status", "executor", "priority", "tenant", "created_at", "id", "not_before", "base"),
    )
    id: Mapped[str] = mapped_column(primary_key=True)
    tenant: Mapped[str] = mapped_column(ForeignKey("tenants.name"))
    spec: Mapped[dict[str, Any]]
    base: Mapped[str | None] = mapped_column(String(64))
    status: Mapped[JobStatus] = mapped_column(_text_enum(JobStatus))
    attempt: Mapped[int] = mapped_column(default=0)
    returned: Mapped[int] = mapped_column(default=0)
    max_attempts: Mapped[int | None]
    owner: Mapped[str | None]
    lease_until: Mapped[float | None]
    pending_action: Mapped[str | None] = mapped_column(String(32))
    priority: Mapped[int] = mapped_column(default=0, server_default="0")
    executor: Mapped[str] = mapped_column(String(32), default="session", server_default="session")
    cost: Mapped[float] = mapped_column(default=0.0, server_default="0")
    not_before: Mapped[float | None]
    micro_tokens: Mapped[int | None]
    lost_step: Mapped[int | None]
    max_lost_step: Mapped[int | None]
    shared: Mapped[bool] = mapped_column(default=False, server_default=false())
    alone: Mapped[bool] = mapped_column(default=False, server_default=false())
    step: Mapped[int] = mapped_column(default=0)
    trained_tokens: Mapped[int] = mapped_column(BigInteger, default=0)
    loss: Mapped[float | None]
    valid_loss: Mapped[float | None]
    tokens_per_second: Mapped[float | None]
    version: Mapped[str | None] = mapped_column(String(64))
    result: Mapped[str | None] = mapped_column(String(64))
    error_code: Mapped[str | None]
    error_message: Mapped[str | None]
    labels: Mapped[dict[str, str]] = mapped_column("metadata")
    sweep: Mapped[list[dict[str, Any]] | None]
    created_at: Mapped[float]
    started_at: Mapped[float | None]
    finished_at: Mapped[float | None]


class CheckpointRow(TableBase):
    """A validated checkpoint of a job; its version is deleted when newer checkpoints replace it."""

    __tablename__ = "job_checkpoints"
    __table_args__ = (Index(None, "job", "step"),)
    id: Mapped[str] = mapped_column(primary_key=True)
    job: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    step: Mapped[int]
    version: Mapped[str | None] = mapped_column(String(64))
    metrics: Mapped[dict[str, float]]
    created_at: Mapped[float]


class WorkerSlotRow(TableBase):
    """A worker slot that a supervisor holds for a session or a dedicated trainer.

    A supervisor that disappears, together with its session, stops extending `until`. A session that is `ending` ends
    after its current job.
    """

    __tablename__ = "worker_slots"
    name: Mapped[str] = mapped_column(primary_key=True)
    holder: Mapped[str]
    until: Mapped[float]
    size: Mapped[int]
    ending: Mapped[bool]


class PoolGpuRow(TableBase):
    """A kind of GPU on which a session or a trainer has run, and when one last started there."""

    __tablename__ = "pool_gpus"
    name: Mapped[str] = mapped_column(primary_key=True)
    bytes: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    capability: Mapped[str]
    last_seen_at: Mapped[float]


class EventRow(TableBase):
    """One line of a job's history."""

    __tablename__ = "job_events"
    __table_args__ = (Index(None, "job", "id"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    job: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    created_at: Mapped[float]
    level: Mapped[str]
    kind: Mapped[str]
    message: Mapped[str]
    data: Mapped[dict[str, Any]]


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
    __table_args__ = (_version_of_adapter(),)
    adapter: Mapped[str] = mapped_column(ForeignKey("adapters.name"), primary_key=True)
    alias: Mapped[Alias] = mapped_column(_text_enum(Alias), primary_key=True)
    version: Mapped[str] = mapped_column(String(64))


class AliasChangeRow(TableBase):
    """One move of an alias; the newest row is equal to the alias."""

    __tablename__ = "alias_changes"
    __table_args__ = (_version_of_adapter(), Index(None, "adapter", "id"))
    id: Mapped[int] = mapped_column(primary_key=True)
    adapter: Mapped[str] = mapped_column(ForeignKey("adapters.name"))
    alias: Mapped[Alias] = mapped_column(_text_enum(Alias))
    version: Mapped[str | None] = mapped_column(String(64))
    reason: Mapped[str]
    created_at: Mapped[float]


class EvaluationRow(TableBase):
    """Metrics of a version of an adapter, or of the base (`version` is null).

    `results` is the artifact with the results of each example, of all candidates of a nightly run.
    """

    __tablename__ = "evaluations"
    __table_args__ = (_version_of_adapter(), Index(None, "adapter", "id"))
    id: Mapped[int] = mapped_column(primary_key=True)
    adapter: Mapped[str] = mapped_column(ForeignKey("adapters.name"))
    version: Mapped[str | None] = mapped_column(String(64))
    dataset: Mapped[str]
    slice: Mapped[str]
    examples: Mapped[int]
    metrics: Mapped[dict[str, float]]
    results: Mapped[str | None] = mapped_column(String(64))
    created_at: Mapped[float]


class NightlyRunRow(TableBase):
    """A nightly run. `open` is true or null, and unique, so that at most one run is open.

    `holder` is the process that works on it, or the last one that did; its lease ends at `lease_until`.
    """

    __tablename__ = "nightly_runs"
    id: Mapped[str] = mapped_column(primary_key=True)
    open: Mapped[bool | None] = mapped_column(unique=True)
    created_at: Mapped[float]
    finished_at: Mapped[float | None]
    holder: Mapped[str | None]
    lease_until: Mapped[float | None]
    #: What the scan of its sources found, a `SourceScan`; null if it has not ended.
    sources: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))


class NightlyTimeRow(TableBase):
    """A scheduled time and the run that began for it. As the primary key, it has one run, whatever looks at it.

    Without a run, it is the time at which a schedule began; an empty `schedule` means that it ended.
    """

    __tablename__ = "nightly_times"
    scheduled_at: Mapped[float] = mapped_column(primary_key=True)
    schedule: Mapped[str]
    missed: Mapped[int]
    run: Mapped[str | None] = mapped_column(ForeignKey("nightly_runs.id"))


class NightlyStepRow(TableBase):
    """One step of a nightly run for one adapter; `waits` is true while it waits for a person, and else null.

    The index lets one step of an adapter wait, since nulls are distinct.
    """

    __tablename__ = "nightly_steps"
    __table_args__ = (Index("ix_nightly_steps_waits", "waits", "adapter", unique=True),)
    run: Mapped[str] = mapped_column(ForeignKey("nightly_runs.id"), primary_key=True)
    adapter: Mapped[str] = mapped_column(ForeignKey("adapters.name"), primary_key=True)
    step: Mapped[str] = mapped_column(primary_key=True)
    status: Mapped[StepStatus] = mapped_column(_text_enum(StepStatus))
    result: Mapped[dict[str, Any]]
    waits: Mapped[bool | None] = mapped_column(default=None)
    created_at: Mapped[float]
    finished_at: Mapped[float | None]


class NightlyAnswerRow(TableBase):
    """A model's answer in a nightly run, kept until the run has used it, so that a killed run does not ask again.

    `question` is a hash of the model's name and of what it was asked.
    """

    __tablename__ = "nightly_answers"
    run: Mapped[str] = mapped_column(ForeignKey("nightly_runs.id"), primary_key=True)
    adapter: Mapped[str] = mapped_column(primary_key=True)
    question: Mapped[str] = mapped_column(String(64), primary_key=True)
    text: Mapped[str]
    truncated: Mapped[bool]


class AdapterDataRow(TableBase):
    """New data of an adapter; `run` is the nightly run that collected it."""

    __tablename__ = "adapter_data"
    __table_args__ = (Index(None, "run", "adapter"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    adapter: Mapped[str] = mapped_column(ForeignKey("adapters.name"))
    train: Mapped[str] = mapped_column(ForeignKey("datasets.id"))
    valid: Mapped[str | None] = mapped_column(ForeignKey("datasets.id"))
    created_at: Mapped[float]
    run: Mapped[str | None] = mapped_column(ForeignKey("nightly_runs.id"))


class AdapterContentRow(TableBase):
    """An example that nightly runs train an adapter on, or hold out; only hashes of it are stored here.

    `digest` identifies its normalized content, `sketch` its trigrams (empty once its dataset was deleted). `dataset` is
    the dataset that it was frozen in. `run` is the nightly run that used it; null if its data was released. `imported`:
    it comes from a job of the champion that no nightly run submitted.
    """

    __tablename__ = "adapter_content"
    __table_args__ = (Index(None, "dataset"),)
    adapter: Mapped[str] = mapped_column(ForeignKey("adapters.name"), primary_key=True)
    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    side: Mapped[ContentSide] = mapped_column(_text_enum(ContentSide))
    sketch: Mapped[bytes]
    dataset: Mapped[str]
    run: Mapped[str | None] = mapped_column(ForeignKey("nightly_runs.id"))
    imported: Mapped[bool] = mapped_column(default=False, server_default=false())


class SourceFileRow(TableBase):
    """A file that a scan of an adapter's sources has seen.

    `state` is that of storage (size and time or ETag), and `settled` whether the file was read in this state: a file
    that may still be written waits. `content` is the SHA-256 of what was read. `dataset` is the dataset that it became;
    null if the error kept it from that.
    """

    __tablename__ = "source_files"
    adapter: Mapped[str] = mapped_column(String, primary_key=True)
    url: Mapped[str] = mapped_column(primary_key=True)
    tenant: Mapped[str] = mapped_column(ForeignKey("tenants.name"), index=True)
    state: Mapped[str]
    settled: Mapped[bool]
    content: Mapped[str | None] = mapped_column(String(64))
    dataset: Mapped[str | None]
    error: Mapped[str | None]
    seen_at: Mapped[float]


class CompletionRow(TableBase):
    """A completion that its tenant stores: what was requested and answered, until its retention ends.

    `bytes` is its size as JSON, which counts toward its tenant's limit.
    """

    __tablename__ = "completions"
    __table_args__ = (Index(None, "tenant", "created_at"), Index(None, "tenant", "user"))
    id: Mapped[str] = mapped_column(primary_key=True)
    kind: Mapped[CompletionKind] = mapped_column(_text_enum(CompletionKind))
    tenant: Mapped[str] = mapped_column(ForeignKey("tenants.name"))
    adapter: Mapped[str | None] = mapped_column(ForeignKey("adapters.name"), index=True)
    version: Mapped[str | None] = mapped_column(String(64))
    model: Mapped[str]
    user: Mapped[str | None]
    labels: Mapped[dict[str, str]] = mapped_column("metadata")
    request: Mapped[dict[str, Any]]
    response: Mapped[dict[str, Any]]
    bytes: Mapped[int] = mapped_column(BigInteger, default=0, server_default="0")
    created_at: Mapped[float]


class DeletedUserRow(TableBase):
    """A user of a tenant whose completions were deleted, so that gateways store none that ended before.

    `digest` is the SHA-256 of the tenant and the user.
    """

    __tablename__ = "deleted_users"
    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    tenant: Mapped[str] = mapped_column(ForeignKey("tenants.name"), index=True)
    deleted_at: Mapped[float]


class FeedbackRow(TableBase):
    """The rating and the correction of one answer of a stored completion, with which it is deleted.

    `…_used_at` is when a correction became an example, and a rating or a correction a part of a pair; `…_file` is the
    dataset that has it, and null if it was not valid.
    """

    __tablename__ = "feedback"
    __table_args__ = (Index(None, "tenant", "created_at"), Index(None, "completion", "choice", unique=True))
    id: Mapped[str] = mapped_column(primary_key=True)
    tenant: Mapped[str] = mapped_column(ForeignKey("tenants.name"))
    completion: Mapped[str] = mapped_column(ForeignKey("completions.id", ondelete="CASCADE"))
    choice: Mapped[int]
    rating: Mapped[Rating | None] = mapped_column(_text_enum(Rating))
    correction: Mapped[str | None]
    reason: Mapped[str | None]
    created_at: Mapped[float]
    updated_at: Mapped[float]
    example_used_at: Mapped[float | None]
    example_file: Mapped[str | None]
    pair_used_at: Mapped[float | None]
    pair_file: Mapped[str | None]


class RolloutRow(TableBase):
    """A canary, a shadow or a watch of an adapter, as in `RolloutRecord`.

    `open` is true or null, and unique per adapter, so that at most one is open. Versions may be deleted after its end.
    """

    __tablename__ = "rollouts"
    __table_args__ = (UniqueConstraint("adapter", "open"), Index(None, "adapter", "id"))
    id: Mapped[int] = mapped_column(primary_key=True)
    adapter: Mapped[str] = mapped_column(ForeignKey("adapters.name"))
    open: Mapped[bool | None]
    kind: Mapped[RolloutKind] = mapped_column(_text_enum(RolloutKind))
    version: Mapped[str] = mapped_column(String(64))
    baseline: Mapped[str | None] = mapped_column(String(64))
    share: Mapped[float]
    run: Mapped[str | None] = mapped_column(ForeignKey("nightly_runs.id"))
    policy: Mapped[dict[str, Any]]
    started_at: Mapped[float]
    ends_at: Mapped[float | None]
    ended_at: Mapped[float | None]
    outcome: Mapped[RolloutOutcome | None] = mapped_column(_text_enum(RolloutOutcome))
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


class AuditRow(TableBase):
    """One change through the API, written in the same transaction as the change."""

    __tablename__ = "audit"
    __table_args__ = (Index(None, "tenant", "created_at"), Index(None, "created_at"))
    id: Mapped[str] = mapped_column(primary_key=True)
    created_at: Mapped[float]
    tenant: Mapped[str | None] = mapped_column(ForeignKey("tenants.name"))
    actor: Mapped[str | None]
    key: Mapped[str]
    action: Mapped[str]
    subject: Mapped[str]
    details: Mapped[dict[str, Any]]
    request: Mapped[str]
