"""The groups of `loramill-bench nightly`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from loramill.models.catalog import Base
from loramill_bench.nightly import evaluation, forgetting, gate, overhead, poisoned
from loramill_bench.results import Result, run_groups

#: Packages that the evaluation is compared with.
BASELINES = ("transformers", "peft")


def run(
    base: Base,
    only: str = "",
    report: Callable[[str], object] = lambda group: None,
    *,
    tenants: Path | None = None,
    names: Sequence[str] = forgetting.TENANTS,
    examples: int | None = None,
) -> list[Result]:
    """Measures the nightly run.

    Args:
        base: The base that answers and is trained.
        only: Runs only groups whose name contains this.
        report: Called with the name of each group, and of its parts, before they run.
        tenants: A folder with a folder per tenant; None: neither forgetting nor poisoned data is measured.
        names: The tenants whose forgetting is measured.
        examples: Training examples per tenant and run in which forgetting is measured; None: all.

    Raises:
        InvalidRequest: No group's name contains `only`, or a tenant's file is missing.
        SetupError: No scores were measured for the gate.
    """
    groups: dict[str, Callable[[], list[Result]]] = {
        "overhead": partial(overhead.results, report),
        "evaluation": partial(evaluation.results, base, report),
    }
    groups |= {f"gate {metric}": partial(gate.results, metric) for metric in ("exact_match", "token_f1")}
    if tenants is not None:
        groups["forgetting"] = partial(forgetting.results, base, tenants, report, names=names, examples=examples)
        groups["poisoned"] = partial(poisoned.results, base, tenants, report)
    return run_groups(groups, only, report)
