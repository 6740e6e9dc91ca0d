"""The candidates of a sweep, as the job's row lists them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loramill.types import JobSpec, SweepCandidate


def new_candidates(spec: JobSpec) -> list[dict[str, Any]] | None:
    """Returns the candidates of a sweep before their training; None for a job without a sweep."""
    numbered = enumerate(spec.candidates, start=1)
    return to_rows([SweepCandidate(number=number, values=values) for number, values in numbered]) or None


def to_rows(candidates: Sequence[SweepCandidate]) -> list[dict[str, Any]]:
    """Converts candidates to JSON."""
    return [each.model_dump(mode="json") for each in candidates]


def best_values(candidates: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the fields of the best candidate, once one is left; otherwise none."""
    return next((dict(each["values"]) for each in candidates if each["state"] == "best"), {})


def leading(candidates: Sequence[Mapping[str, Any]]) -> int | None:
    """Returns the number of the best candidate, or of the one that was compared last with the lowest loss."""
    ranked = sorted(candidates, key=lambda each: (-len(each["rung_losses"]), each["rung_losses"][-1:], each["number"]))
    return next((each["number"] for each in ranked if each["state"] in ("best", "training")), None)


def all_failed(candidates: Sequence[Mapping[str, Any]]) -> bool:
    """Whether no candidate can be trained further."""
    return all(each["state"] in ("failed", "dropped") for each in candidates)
