"""What is asked for: prompts, models and arrivals."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from loramill.errors import BaseUnusable
from loramill_bench.http.work import DISTINCT, PROMPT, Desk

from ...serve.api.conftest import byte_tokenizer


@pytest.fixture
def desk(tokenizer) -> Desk:
    return Desk("base", tuple(f"t/{number}" for number in range(64)), tokenizer, 7)


def test_prompts_are_64_tokens_of_words_and_all_differ(desk: Desk) -> None:
    streams = desk.closed("none", 8, 4, 0)
    prompts = [ask.prompt for stream in streams for ask in stream.asks]
    assert {len(desk.tokenizer.encode_text(prompt)) for prompt in prompts} == {PROMPT}
    assert len({prompt[:20] for prompt in prompts}) == len(prompts) == 32
    assert {ask.model for stream in streams for ask in stream.asks} == {"base"}


def test_the_same_draw_is_the_same_work_and_another_is_not(desk: Desk) -> None:
    work = desk.closed("zipf", 3, 2, 1)
    assert work == desk.closed("zipf", 3, 2, 1)
    assert work == replace(desk, seed=7).closed("zipf", 3, 2, 1)
    prompts = {ask.prompt for stream in work for ask in stream.asks}
    for other in (desk.closed("zipf", 3, 2, 2), replace(desk, seed=8).closed("zipf", 3, 2, 1)):
        assert prompts.isdisjoint(ask.prompt for stream in other for ask in stream.asks)


def test_a_stream_keeps_its_own_of_distinct_adapters(desk: Desk) -> None:
    models = [{ask.model for ask in stream.asks} for stream in desk.closed("distinct", 10, 3, 0)]
    assert models == [{f"t/{number % DISTINCT}"} for number in range(10)]


def test_zipf_asks_for_the_first_most(desk: Desk) -> None:
    many = Counter(ask.model for stream in desk.closed("zipf", 20, 500, 0) for ask in stream.asks)
    assert len(many) == 64
    assert [many[f"t/{place}"] / many["t/0"] for place in (1, 4)] == pytest.approx([1 / 2, 1 / 5], rel=0.15)


def test_arrivals_are_poisson_of_the_rate(desk: Desk) -> None:
    begins = [stream.begins for stream in desk.arrivals("none", 20.0, 100.0, 0)]
    assert len(begins) == pytest.approx(2000, rel=0.1)
    assert begins == sorted(begins)
    assert begins[0] > 0 and begins[-1] < 100
    gaps = torch.tensor(begins).diff()
    assert float(gaps.std() / gaps.mean()) == pytest.approx(1.0, rel=0.15)  # as of an exponential


def test_a_tokenizer_without_words_is_told_of() -> None:
    with pytest.raises(BaseUnusable, match="has 0 words of one token"):
        Desk("base", (), byte_tokenizer(), 0).closed("none", 1, 1, 0)
