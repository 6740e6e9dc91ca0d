"""Sampling parameters that the API and the command line share, with their bounds and descriptions."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

MaxTokens = Annotated[int | None, Field(ge=1, description="Maximum number of tokens per answer.")]
Temperature = Annotated[
    float,
    Field(ge=0.0, le=2.0, description="Sampling temperature; 0 always selects the most probable token."),
]
TopP = Annotated[
    float,
    Field(gt=0.0, le=1.0, description="Sample from the most probable tokens that together have this probability."),
]
