"""The jobs of a training step, from its recorded result; older results have one job. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def started_jobs(result: Mapping[str, Any]) -> dict[str, str]:
    """The IDs of the jobs by what they train."""
    if "jobs" in result:
        return {kind: each["job"] for kind, each in result["jobs"].items()}
    return {"champion": result["job"]} if "job" in result else {}


def planned_tokens(result: Mapping[str, Any]) -> dict[str, float]:
    """The tokens that each job trains on, by ID."""
    if "jobs" in result:
        return {each["job"]: each["tokens"] for each in result["jobs"].values()}
    return {result["job"]: result.get("tokens", 0.0)} if "job" in result else {}
