"""Challengers that passed the gate of a nightly run and wait for a person."""

from __future__ import annotations

from enum import StrEnum

from pydantic import Field

from loramill.types.base import FrozenModel
from loramill.types.rollouts import Introduction


class ApprovalState(StrEnum):
    """What became of a challenger that waited for approval."""

    PENDING = "pending"
    APPROVED = "approved"
    REJECTED = "rejected"
    SUPERSEDED = "superseded"  # a challenger of a later run passed the gate


class Approval(FrozenModel):
    """A challenger that passed the gate of a nightly run, and a person's decision about it."""

    run: str = Field(description="ID of the nightly run.")
    adapter: str = Field(description="Name of the adapter.")
    version: str = Field(description="Version that passed the gate.")
    champion: str = Field(description="Champion that it was compared with.")
    reason: str = Field(description="The gate's reason, in words.")
    introduction: Introduction = Field(description="How the version takes over once it is approved.")
    requested_at: float = Field(description="Since when it waits, in seconds since the epoch.")
    state: ApprovalState = Field(
        default=ApprovalState.PENDING,
        description="State: pending, approved, rejected, or superseded, by a challenger of a later run that passed the "
        "gate.",
    )
    decided_at: float | None = Field(default=None, description="When it was decided. Null: it waits.")
    decided_by: str | None = Field(
        default=None,
        description="API key of the decision, `command line`, or the later run. Null: it waits.",
    )
    note: str = Field(default="", description="What the person wrote about the decision.")
