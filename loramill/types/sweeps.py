"""Sweeps: jobs that train several candidates and publish the best."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from loramill.types.base import FrozenModel

CandidateState = Literal["training", "dropped", "failed", "best"]


class SweepCandidate(FrozenModel):
    """A candidate of a sweep, and how far it has been trained."""

    number: int = Field(description="Number of the candidate, from 1.")
    values: dict[str, Any] = Field(description="The fields of the spec in which the candidates differ.")
    state: CandidateState = Field(
        default="training",
        description="State: training; dropped, since others had a lower validation loss; failed; or best, which is the "
        "one that is published.",
    )
    step: int = Field(default=0, description="Optimizer steps done.")
    trained_tokens: int = Field(default=0, description="Tokens trained on, prompts included.")
    valid_loss: float | None = Field(default=None, description="Last validation loss.")
    best_valid_loss: float | None = Field(default=None, description="Lowest validation loss.")
    rung_losses: tuple[float, ...] = Field(
        default=(), description="Losses by which it was compared, at each step where candidates were dropped."
    )
    error: str | None = Field(default=None, description="Why it failed.")
