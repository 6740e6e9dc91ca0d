"""The sampler against the distributions that its words describe."""

from collections import Counter

import pytest
import torch

from loramill.serve.engine import Sampling
from loramill.serve.engine.sampling import logprobs_of, new_generator, sample

LOGITS = torch.tensor([1.0, 3.0, 0.5, 2.0, -1.0])


def draw(logits, count=4000, **settings) -> Counter:
    sampling = Sampling(max_tokens=1, seed=11, **settings)
    generator = new_generator(sampling)
    return Counter(sample(logits, sampling, generator) for _ in range(count))


def expected(logits, **settings) -> torch.Tensor:
    """By definition: temperature, then the top_k likeliest, then the fewest likeliest that hold top_p."""
    p = (logits / settings["temperature"]).softmax(-1)
    order = p.argsort(descending=True)
    if settings.get("top_k"):
        p[order[settings["top_k"] :]] = 0
        p = p / p.sum()
    before = 0.0
    for token in order.tolist():
        share = float(p[token])
        if before >= settings.get("top_p", 1.0):
            p[token] = 0
        before += share
    return p / p.sum()


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0},
        {"temperature": 0.5},
        {"temperature": 2.0, "top_k": 3},
        {"temperature": 1.0, "top_p": 0.7},
        {"temperature": 1.0, "top_p": 0.99},
        {"temperature": 2.0, "top_k": 4, "top_p": 0.6},
        {"temperature": 1.0, "top_k": 1},
        {"temperature": 1.0, "top_p": 0.01},
        {"temperature": 1.0, "top_k": 50},
    ],
)
def test_tokens_come_as_often_as_they_should(settings):
    got = draw(LOGITS, **settings)
    for token, p in enumerate(expected(LOGITS, **settings).tolist()):
        assert got[token] == 0 if p == 0 else abs(got[token] / 4000 - p) < 0.035


@pytest.mark.parametrize("settings", [{"top_p": 0.95}, {"top_p": 0.3}, {"top_k": 600, "top_p": 0.8}, {"top_k": 300}])
def test_flat_distributions_over_large_vocabularies_are_cut_right(settings):
    logits = torch.randn(2000, generator=torch.Generator().manual_seed(1)) * 0.1
    allowed = {i for i, p in enumerate(expected(logits, temperature=1.0, **settings).tolist()) if p > 0}
    got = set(draw(logits, count=3000, temperature=1.0, **settings))
    assert got <= allowed
    assert len(got) > 0.7 * len(allowed)


def test_no_temperature_or_hardly_any_takes_the_likeliest():
    for temperature in (0.0, 1e-40, 1e-6, 1e-4):
        assert set(draw(LOGITS, count=20, temperature=temperature)) == {1}


def test_a_seed_repeats_and_none_does_not():
    flat = torch.zeros(1000)

    def tokens(seed):
        sampling = Sampling(max_tokens=1, temperature=1.0, seed=seed)
        generator = new_generator(sampling)
        return [sample(flat, sampling, generator) for _ in range(8)]

    assert tokens(7) == tokens(7) != tokens(8)
    assert tokens(-1) == tokens(-1)
    assert tokens(None) != tokens(None)


def test_logprobs_are_natural_and_sum_to_one():
    all_of_them = logprobs_of(LOGITS, 3, 20)
    assert [token for token, _ in all_of_them.top] == [1, 3, 0, 2, 4]
    assert torch.tensor([p for _, p in all_of_them.top]).exp().sum() == pytest.approx(1.0)
    assert all_of_them.logprob == all_of_them.top[1][1]
