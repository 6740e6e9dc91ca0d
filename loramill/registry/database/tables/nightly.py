"""Tables of nightly runs: schedule, steps and new data."""

from __future__ import annotations

from typing import Any

from sqlalchemy import JSON, ForeignKey, Index, String, false
from sqlalchemy.orm import Mapped, mapped_column

from loramill.registry.database.tables.base import TableBase, text_enum
from loramill.types import ContentSide, StepStatus


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
    status: Mapped[StepStatus] = mapped_column(text_enum(StepStatus))
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
    side: Mapped[ContentSide] = mapped_column(text_enum(ContentSide))
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
