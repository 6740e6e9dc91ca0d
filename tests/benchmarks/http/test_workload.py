"""Workloads: prompts, models and arrivals."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from loramill.errors import BaseUnusable
from loramill_bench.http.workload import DISTINCT, PROMPT_TOKENS, Workload

from ...serve.api.conftest import byte_tokenizer


@pytest.fixture
def workload(tokenizer) -> Workload:
    return Workload("base", tuple(f"t/{number}" for number in range(64)), tokenizer, 7)


def test_prompts_are_64_tokens_of_words_and_distinct(workload: Workload) -> None:
    streams = workload.closed_loop("none", 8, 4, 0)
    prompts = [request.prompt for stream in streams for request in stream.requests]
    assert {len(workload.tokenizer.encode_text(prompt)) for prompt in prompts} == {PROMPT_TOKENS}
    assert len({prompt[:20] for prompt in prompts}) == len(prompts) == 32
    assert {request.model for stream in streams for request in stream.requests} == {"base"}


def test_the_same_seeds_give_the_same_requests_and_others_do_not(workload: Workload) -> None:
    streams = workload.closed_loop("zipf", 3, 2, 1)
    assert streams == workload.closed_loop("zipf", 3, 2, 1)
    assert streams == replace(workload, seed=7).closed_loop("zipf", 3, 2, 1)
    prompts = {request.prompt for stream in streams for request in stream.requests}
    for other in (workload.closed_loop("zipf", 3, 2, 2), replace(workload, seed=8).closed_loop("zipf", 3, 2, 1)):
        assert prompts.isdisjoint(request.prompt for stream in other for request in stream.requests)


def test_each_stream_keeps_its_distinct_adapter(workload: Workload) -> None:
    models = [{request.model for request in stream.requests} for stream in workload.closed_loop("distinct", 10, 3, 0)]
    assert models == [{f"t/{number % DISTINCT}"} for number in range(10)]


def test_zipf_requests_lower_ranks_more_often(workload: Workload) -> None:
    counts = Counter(
        request.model for stream in workload.closed_loop("zipf", 20, 500, 0) for request in stream.requests
    )
    assert len(counts) == 64
    assert [counts[f"t/{rank}"] / counts["t/0"] for rank in (1, 4)] == pytest.approx([1 / 2, 1 / 5], rel=0.15)


def test_arrivals_are_a_poisson_process_of_the_rate(workload: Workload) -> None:
    starts = [stream.start_seconds for stream in workload.poisson("none", 20.0, 100.0, 0)]
    assert len(starts) == pytest.approx(2000, rel=0.1)
    assert starts == sorted(starts)
    assert starts[0] > 0 and starts[-1] < 100
    gaps = torch.tensor(starts).diff()
    assert float(gaps.std() / gaps.mean()) == pytest.approx(1.0, rel=0.15)  # as for an exponential distribution


def test_a_tokenizer_without_words_is_reported() -> None:
    with pytest.raises(BaseUnusable, match="has only 0 words of one token"):
        Workload("base", (), byte_tokenizer(), 0).closed_loop("none", 1, 1, 0)
