"""Whether a job fits one GPU of the pool, before anything runs: from config.json and the examples' lengths alone."""

from __future__ import annotations

from collections.abc import Sequence

from loramill.models.catalog import Base
from loramill.settings import JobSettings
from loramill.sizing.anatomy import Anatomy, Linear, anatomy, find_config, linears, read_config
from loramill.sizing.memory import Item, Need, Row
from loramill.sizing.planner import FREE, Plan, Pool, Question, gb, plan
from loramill.sizing.targets import check_targets
from loramill.types import JobSpec

__all__ = [
    "FREE",
    "Anatomy",
    "Item",
    "Linear",
    "Need",
    "Plan",
    "Pool",
    "Question",
    "Row",
    "anatomy",
    "check_targets",
    "find_config",
    "fitted",
    "gb",
    "linears",
    "plan",
    "read_config",
]


def fitted(spec: JobSpec, base: Base, lengths: Sequence[int], settings: JobSettings) -> tuple[JobSpec, str | None]:
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
    pool = Pool.of(settings)
    if pool is None:
        return spec, None
    found = plan(
        Question(
            spec=spec,
            base=anatomy(read_config(str(base.folder))),
            quantization=base.quantization,
            lengths=tuple(lengths),
            pool=pool,
            open=frozenset(FREE) - spec.model_fields_set,
        )
    )
    return found.spec, found.told
