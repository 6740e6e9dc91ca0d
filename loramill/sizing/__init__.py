"""Decides whether a job fits one GPU of the pool before anything runs, from config.json and the examples' lengths."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from loramill.models.catalog import Base
from loramill.settings import JobSettings
from loramill.sizing.anatomy import Anatomy, LinearShape, anatomy, find_config, linears, read_config
from loramill.sizing.memory import MemoryEstimate
from loramill.sizing.passes import MemoryItem, MemoryRow
from loramill.sizing.planner import ADJUSTABLE, GpuPool, SizingPlan, SizingRequest, format_bytes, plan
from loramill.sizing.sweep_plan import plan_sweep
from loramill.sizing.targets import check_targets, refuse_experts
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
    "refuse_experts",
]


def fit_spec(
    spec: JobSpec,
    base: Base,
    lengths: Sequence[int],
    settings: JobSettings,
    adjustable: Collection[str] | None = None,
) -> tuple[JobSpec, str | None]:
    """Chooses the fields that sizing may change (`ADJUSTABLE`) so that a job fits one device of the pool.

    The candidates of a sweep have to fit together.

    Args:
        spec: the job.
        base: its base.
        lengths: tokens of the examples; a pair has those of both answers.
        settings: the pool's.
        adjustable: fields of `ADJUSTABLE` that may change; None: those with which the spec was not made, so that what
            a submitter set stays.

    Returns:
        The spec, and a sentence for the job's events. Without known memory of a device: the spec unchanged, and None.

    Raises:
        DoesNotFit: no choice fits; `nearest` lists the nearest jobs that do.
        InvalidRequest: a target, layer or pattern matches nothing.
    """
    pool = GpuPool.from_settings(settings)
    if pool is None:
        return spec, None
    request = SizingRequest(
        spec=spec,
        base=anatomy(read_config(str(base.folder))),
        quantization=base.quantization,
        lengths=tuple(lengths),
        pool=pool,
        adjustable=frozenset(ADJUSTABLE) - spec.model_fields_set if adjustable is None else frozenset(adjustable),
    )
    if spec.candidates:
        return plan_sweep(request, settings.pass_tokens)
    found = plan(request)
    return found.spec, found.explanation
