"""What serving reaches over HTTP on this machine, against vLLM and the bare engine: `loramill-bench serve`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from loramill.models.catalog import Base
from loramill.settings import Settings
from loramill_bench.http import added, compare, overload, promotion
from loramill_bench.http.servers import vllm_version
from loramill_bench.http.site import Site
from loramill_bench.measure import Result, measured

__all__ = ["run", "vllm_version"]


def run(
    base: Base,
    only: str = "",
    report: Callable[[str], object] = lambda group: None,
    *,
    vllm: Path | None = None,
    seed: int = 0,
    rounds: int = 3,
) -> list[Result]:
    """Measures a `loramill up` of its own: streams of 64 tokens after prompts of 64, by the clock, medians.

    All cores are shared by who asks and the server that is asked. With SmolLM2-135M on two cores that takes some ten
    minutes, with vLLM half an hour, 8 GB, and 1 GB of temporary files.

    Args:
        base: that is served, in bfloat16; vLLM loads it, too.
        only: groups of cases whose name contains this; a case's name begins with its group's.
        report: is told the name of each group before it is measured.
        vllm: a Python that vLLM is installed for; without one its cases are left out.
        seed: of adapters and requests.
        rounds: of a comparison, besides the one that warms up.

    Returns:
        A result a case.

    Raises:
        InvalidRequest: `only` leaves nothing over.
        SetupError: a server doesn't come up.
        EngineFault: requests failed where nothing may.
    """
    with (
        tempfile.TemporaryDirectory(prefix="loramill-bench-") as folder,
        Site(base, Settings.load(), Path(folder), vllm, seed) as site,
    ):
        return measured(_groups(site, rounds), only, report)


def _groups(site: Site, rounds: int) -> Mapping[str, Callable[[], list[Result]]]:
    return {
        **{case.name: partial(compare.measure, site, case, rounds) for case in compare.CASES},
        "gateway first token": partial(added.to_first_token, site, rounds),
        "gateway 32": partial(added.to_throughput, site, rounds),
        "promote 32": partial(promotion.measure, site, rounds),
        "overload": partial(overload.measure, site, rounds),
    }
