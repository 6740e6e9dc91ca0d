"""Whether a job fits one GPU of the pool, before anything runs: from config.json and the examples' lengths alone."""

from __future__ import annotations

from collections.abc import Sequence

from loramill.models.catalog import Base
from loramill.settings import JobSettings
from loramill.sizing.anatomy import Anatomy, LinearShape, anatomy, find_config, linears, read_config
from loramill.sizing.memory import MemoryEstimate, MemoryItem, MemoryRow
from loramill.sizing.planner import ADJUSTABLE, GpuPool, SizingPlan, SizingRequest, format_bytes, plan
from loramill.sizing.targets import check_targets
from loramill.types import JobSpec

__all__ = [
    "ADJUSTABLE",
    "Anatomy",
    "GpuPool",
    "LinearShape",
    "MemoryEstimate",
    "MemoryItem",
    "MemoryRow",
    "SizingPlan",
    "SizingRequest",
    "anatomy",
    "check_targets",
    "find_config",
    "fit_spec",
    "format_bytes",
    "linears",
    "plan",
    "read_config",
]


def fit_spec(spec: JobSpec, base: Base, lengths: Sequence[int], settings: JobSettings) -> tuple[JobSpec, str | None]:
    """The spec with what sizing may choose (micro_tokens, gradient_checkpointing, offload) chosen so that it fits.

    What the submitter said stays: that are the fields with which the spec was made.

    Args:
        spec: as `resolve_spec` made it.
        base: its base.
        lengths: tokens of the training examples.
        settings: of the pool.

    Returns:
        The spec, and a sentence for the job's history; as it was and None where `device_bytes` isn't set.

    Raises:
        DoesNotFit: no choice fits; `nearest` tells the nearest jobs that do.
        InvalidRequest: a target, layer or pattern matches nothing.
    """
    pool = GpuPool.from_settings(settings)
    if pool is None:
        return spec, None
    found = plan(
        SizingRequest(
            spec=spec,
            base=anatomy(read_config(str(base.folder))),
            quantization=base.quantization,
            lengths=tuple(lengths),
            pool=pool,
            adjustable=frozenset(ADJUSTABLE) - spec.model_fields_set,
        )
    )
    return found.spec, found.explanation
