"""Whether the candidates of a sweep fit one session."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from loramill.errors import DoesNotFit
from loramill.sizing import ADJUSTABLE, GpuPool, SizingRequest
from loramill.sizing.passes import largest_row
from loramill.sizing.sweep_plan import plan_sweep
from loramill.sizing.targets import trained_elements
from loramill.sizing.tenants import SessionJob, estimate_session

from .test_tenants import BASE, spec_of

GB = 10**9


def request_of(gigabytes: float, *candidates: dict[str, Any]) -> SizingRequest:
    spec = spec_of(batch_size=8, candidates=candidates)
    pool = GpuPool("cpu", int(gigabytes * GB))
    return SizingRequest(spec, BASE, "none", (64,) * 20, pool, frozenset(ADJUSTABLE))


def test_the_candidates_take_what_as_many_jobs_of_a_session_take() -> None:
    request = request_of(100, {"rank": 8}, {"rank": 64})
    spec, explanation = plan_sweep(request, 1024)
    jobs = [
        SessionJob(each, trained_elements(each, BASE), largest_row(each, request.lengths))
        for each in spec.trained_specs
    ]
    needed = estimate_session(jobs, BASE, "none", "cpu", pass_tokens=1024).bytes
    assert explanation.startswith(f"Fits: 2 candidates take about {needed / GB:.3g} GB of 100 GB with micro_tokens")
    assert spec.candidates == request.spec.candidates


def test_a_choice_is_made_with_which_all_fit() -> None:
    roomy = request_of(100, *({"rank": rank} for rank in (8, 16, 32, 64)))
    chosen, text = plan_sweep(roomy, 1024)
    budget = float(text.split(" GB of")[0].split()[-1]) - 0.02
    smaller, _ = plan_sweep(replace(roomy, pool=GpuPool("cpu", int(budget * GB))), 1024)
    assert (smaller.micro_tokens, smaller.gradient_checkpointing) != (
        chosen.micro_tokens,
        chosen.gradient_checkpointing,
    )


def test_a_sweep_that_does_not_fit_is_refused_with_the_number_that_would() -> None:
    with pytest.raises(DoesNotFit, match=r"8 candidates of the sweep need .* the first [1-7] fit") as refused:
        plan_sweep(request_of(6, *({"rank": 200 + number} for number in range(8))), 256)
    assert refused.value.param == "loramill.sweep" and refused.value.nearest[0].endswith(" candidates")
    with pytest.raises(DoesNotFit, match="not even one fits"):
        plan_sweep(request_of(0.1, {"rank": 8}, {"rank": 16}))
