"""Evaluations of versions, as means over a slice and per example."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from loramill.types.base import FrozenModel

#: What a nightly run evaluates on the same examples; `previous` was the champion before.
Candidate = Literal["base", "previous", "champion", "challenger"]


class EvaluationRecord(FrozenModel):
    """Metrics of a version, or of the base (`version` is None), on one slice of held-out examples."""

    id: int = Field(description="Number of the evaluation.")
    adapter: str = Field(description="Name of the adapter.")
    version: str | None = Field(description="Version that was evaluated. Null: the base model.")
    dataset: str = Field(description="ID of the dataset.")
    slice: str = Field(description="Name of the slice of held-out examples.")
    examples: int = Field(description="Number of examples.")
    metrics: dict[str, float] = Field(description="Metrics by name.")
    results: str | None = Field(
        default=None, description="Hash of the stored results of each example. Null: none are stored."
    )
    created_at: float = Field(description="When it was evaluated, in seconds since the epoch.")


class ExampleResult(FrozenModel):
    """The result of one candidate on one held-out example.

    Attributes:
        example: hash of the example's prompt and reference, the same for all candidates and runs.
        version: the candidate's version; None for the base.
        scores: by metric.
        truncated: whether the answer reached its maximum number of tokens.
        slices: the slices that contain the example.
    """

    example: str
    candidate: Candidate
    version: str | None
    scores: dict[str, float]
    answer: str
    truncated: bool = False
    slices: tuple[str, ...]
