"""The sampler against the distributions that its documentation defines: naive float64, and transformers' processors."""

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from loramill.serve.engine import SamplingParams
from loramill.serve.engine import sampler as sampling
from loramill.serve.engine.sampler import Sampler, _mix, argmax_by_torch, sample, token_logprobs

LOGITS = torch.tensor([1.0, 3.0, 0.5, 2.0, -1.0])


def tokens(logits, count, prompt=(), index=0, **knobs) -> list[int]:
    """An answer of `count` tokens, the logits the same at each."""
    sampler = Sampler(SamplingParams(**{"max_tokens": count, "seed": 11, **knobs}), prompt, index)
    answer = []
    for _ in range(count):
        (token,) = sample(logits[None], [sampler])
        sampler.accept(token)
        answer.append(token)
    return answer


def naive(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) -> np.ndarray:
    """The distribution by the definitions, one filter after the other, each renormalised; float64."""
    x = logits.double().numpy()
    p = np.exp((x - x.max()) / temperature)
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    if top_k:
        p[order[top_k:]] = 0.0
        p /= p.sum()
    before = p[order].cumsum() - p[order]
    p[order[1:][before[1:] >= top_p]] = 0.0
    p /= p.sum()
    p[p < min_p * p.max()] = 0.0
    return p / p.sum()


def oracle(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) -> np.ndarray:
    """The same by transformers, in its own order."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    warpers += [TopPLogitsWarper(top_p), MinPLogitsWarper(min_p)]
    return warpers(None, logits[None].double())[0].softmax(-1).numpy()


def assert_drawn_from(p: np.ndarray, drawn: list[int]) -> None:
    """Pearson's chi-square at a chance of about one in 10^6, by Wilson and Hilferty; nothing of probability 0."""
    counts = np.bincount(drawn, minlength=len(p))
    assert not counts[p == 0].any()
    expected = p * len(drawn)
    common = expected >= 5
    got = np.append(counts[common], counts[~common].sum())
    due = np.append(expected[common], expected[~common].sum())
    got, due = got[due > 0], due[due > 0]
    freedom = len(got) - 1
    if freedom:
        chi = ((got - due) ** 2 / due).sum()
        assert (chi / freedom) ** (1 / 3) < 1 - 2 / (9 * freedom) + 4.8 * math.sqrt(2 / (9 * freedom))


KNOBS = [
    {},
    {"temperature": 0.5},
    {"temperature": 2.0, "top_k": 3},
    {"top_p": 0.7},
    {"top_p": 0.99},
    {"temperature": 2.0, "top_k": 4, "top_p": 0.6},
    {"top_k": 1},
    {"top_p": 0.01},
    {"top_k": 50},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"temperature": 3.0, "top_k": 4, "top_p": 0.95, "min_p": 0.5},
]


@pytest.mark.parametrize("knobs", KNOBS)
def test_tokens_are_as_frequent_as_in_the_distribution(knobs):
    p = oracle(LOGITS, **knobs)
    np.testing.assert_allclose(p, naive(LOGITS, **knobs), atol=1e-12)
    assert_drawn_from(p, tokens(LOGITS, 4000, temperature=knobs.get("temperature", 1.0), **without_t(knobs)))


def without_t(knobs):
    return {name: value for name, value in knobs.items() if name != "temperature"}


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    vocabulary=st.integers(2, 700),
    spread=st.sampled_from([0.0, 0.1, 1.0, 4.0]),
    temperature=st.floats(0.05, 5.0),
    top_k=st.one_of(st.just(0), st.integers(1, 800)),
    top_p=st.one_of(st.just(1.0), st.floats(0.01, 1.0)),
    min_p=st.one_of(st.just(0.0), st.floats(0.0, 1.0)),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_any_distribution_is_drawn_from(vocabulary, spread, seed, **knobs):
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(vocabulary)) * spread
    assert_drawn_from(naive(logits, **knobs), tokens(logits, 600, seed=seed, **knobs))


@pytest.mark.parametrize("knobs", [{"top_p": 0.95}, {"top_p": 0.3}, {"top_k": 600, "top_p": 0.8}, {"top_k": 300}, {}])
def test_flat_distributions_over_large_vocabularies_are_cut_correctly(knobs):
    logits = torch.randn(2000, generator=torch.Generator().manual_seed(1)) * 0.1
    allowed = set(np.flatnonzero(oracle(logits, **knobs)).tolist())
    got = set(tokens(logits, 8000, temperature=1.0, **knobs))
    assert got <= allowed
    assert len(got) > 0.97 * len(allowed)


def test_among_equal_tokens_the_lower_ids_are_kept():
    flat = torch.zeros(8)
    assert set(tokens(flat, 200, temperature=1.0, top_k=3)) == {0, 1, 2}
    assert set(tokens(flat, 200, temperature=1.0, top_p=0.5)) == {0, 1, 2, 3}
    assert set(tokens(flat, 200, temperature=1.0, top_k=4, top_p=0.5)) == {0, 1}


def test_a_temperature_of_zero_or_almost_zero_is_greedy():
    for temperature in (0.0, 1e-40, 1e-6, 1e-4):
        assert set(tokens(LOGITS, 20, temperature=temperature)) == {1}
    assert set(tokens(torch.full((9,), torch.finfo(torch.float32).min).index_fill(0, torch.tensor(4), 1.0), 20)) == {4}


def test_a_seed_repeats_and_none_does_not():
    flat = torch.zeros(1000)

    def eight(seed, index=0):
        return tokens(flat, 8, temperature=1.0, seed=seed, index=index)

    assert eight(7) == eight(7) != eight(8)
    assert eight(-1) == eight(-1)
    assert eight(2**63 - 1, 1) == eight(-(2**63))
    assert eight(None) != eight(None)


def test_one_of_n_answers_has_the_seed_plus_its_index():
    flat = torch.zeros(1000)
    answers = [tokens(flat, 8, temperature=1.0, seed=5, index=index) for index in range(4)]
    assert answers == [tokens(flat, 8, temperature=1.0, seed=5 + index) for index in range(4)]
    assert len(set(map(tuple, answers))) == 4


def test_random_words_are_splitmix64():
    """The first outputs for the seed 1234567 of the algorithm's published code."""
    words = [_mix(1234567 + step * 0x9E3779B97F4A7C15) for step in range(1, 6)]
    assert words == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def test_numbers_are_independent_from_token_to_token_and_from_seed_to_seed():
    flat, even = torch.zeros(16), np.full(256, 1 / 256)
    answer = tokens(flat, 8000, temperature=1.0, seed=0)
    assert_drawn_from(even, [a * 16 + b for a, b in pairwise(answer)])
    firsts = [tokens(flat, 1, temperature=1.0, seed=seed)[0] for seed in range(8000)]
    assert_drawn_from(even, [a * 16 + b for a, b in pairwise(firsts)])


MIXED = [
    {},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.3, "top_k": 40, "min_p": 0.01},
    {"repetition_penalty": 1.3},
    {"temperature": 1.0, "presence_penalty": 1.0, "frequency_penalty": 0.5, "top_p": 0.5},
    {"logit_bias": ((3, 9.0),), "temperature": 2.0},
    {"min_tokens": 3, "stop_ids": (1, 5), "temperature": 1.0},
]


@pytest.mark.parametrize("vocabulary", [2, 101, 1000])
def test_a_row_does_not_depend_on_the_others(vocabulary):
    generator = torch.Generator().manual_seed(vocabulary)
    knobs = [{name: value for name, value in mixed.items() if name != "logit_bias"} for mixed in MIXED]
    knobs = [*knobs, *(MIXED if vocabulary > 3 else [])]

    def samplers():
        return [Sampler(SamplingParams(9, seed=seed, **each), [0, 1]) for seed, each in enumerate(knobs)]

    together, alone, some = samplers(), samplers(), samplers()
    for step in range(6):
        logits = torch.randn(len(knobs), vocabulary, generator=generator) * 3
        chosen = sample(logits, together)
        assert chosen == [sample(row[None], [one])[0] for row, one in zip(logits, alone, strict=True)]
        order = torch.randperm(len(knobs), generator=generator).tolist()[: step + 1]
        assert sample(logits[order], [some[row] for row in order]) == [chosen[row] for row in order]
        for sampler, token in zip(together + alone + some, chosen * 3, strict=True):
            sampler.accept(token)


def test_an_answer_resumes_unchanged_after_a_preemption():
    logits = torch.randn(40, 50, generator=torch.Generator().manual_seed(3))
    sampling = SamplingParams(40, 1.0, seed=9, repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=0.1)
    sampler, answer = Sampler(sampling, [1, 2]), []
    for step, row in enumerate(logits):
        if step % 7 == 6:
            sampler = Sampler(sampling, [1, 2])
            for token in answer:
                sampler.accept(token)
        again = sample(row[None], [sampler])
        assert sample(row[None], [sampler]) == again
        answer += again
        sampler.accept(again[0])
    assert len(set(answer)) > 10
    whole, sampler = [], Sampler(sampling, [1, 2])
    for row in logits:
        whole += sample(row[None], [sampler])
        sampler.accept(whole[-1])
    assert whole == answer


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    prompt=st.lists(st.integers(0, 29), min_size=1, max_size=40),
    penalty=st.floats(0.3, 3.0),
    seed=st.integers(0, 2**32),
)
def test_the_repetition_penalty_is_that_of_transformers(prompt, penalty, seed):
    generator = torch.Generator().manual_seed(seed)
    sampler, known = Sampler(SamplingParams(9, repetition_penalty=penalty), prompt), list(prompt)
    processor = RepetitionPenaltyLogitsProcessor(penalty)
    for _ in range(12):
        logits = torch.randn(1, 30, generator=generator)
        before = logits.clone()
        (token,) = sample(logits, [sampler])
        assert token == int(processor(torch.tensor([known]), logits.clone()).argmax())
        assert torch.equal(logits, before)
        sampler.accept(token)
        known.append(token)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    presence=st.floats(-2.0, 2.0),
    frequency=st.floats(-2.0, 2.0),
    repetition=st.sampled_from([1.0, 1.5]),
    bias=st.dictionaries(st.integers(0, 11), st.floats(-3.0, 3.0), max_size=5),
    min_tokens=st.integers(0, 6),
    seed=st.integers(0, 2**32),
)
def test_changed_logits_are_those_of_the_definitions(presence, frequency, repetition, bias, min_tokens, seed):
    prompt, stops = [2, 3, 3], (0, 1, 500)
    sampling = SamplingParams(
        max_tokens=12,
        presence_penalty=presence,
        frequency_penalty=frequency,
        repetition_penalty=repetition,
        logit_bias=tuple(bias.items()),
        min_tokens=min_tokens,
        stop_ids=stops,
    )
    generator = torch.Generator().manual_seed(seed)
    sampler, answer = Sampler(sampling, prompt), []
    for step in range(12):
        logits = torch.randn(12, generator=generator)
        due = logits.double().numpy()
        for token in set(prompt + answer):
            due[token] = due[token] / repetition if due[token] > 0 else due[token] * repetition
        for token, count in Counter(answer).items():
            due[token] -= presence + count * frequency
        for token, amount in bias.items():
            due[token] += amount
        if step < min_tokens:
            due[[0, 1]] = -np.inf
        (token,) = sample(logits[None], [sampler])
        assert due[token] == pytest.approx(due.max(), abs=1e-5)
        # Now and then another token than the sampled one, so that the counts differ.
        answer.append(token if step % 3 else step)
        sampler.accept(answer[-1])


def test_penalties_change_the_distribution_that_is_drawn_from():
    logits = LOGITS.clone()
    sampler = Sampler(
        SamplingParams(9, 1.0, seed=0, presence_penalty=1.0, frequency_penalty=0.5, logit_bias=((4, 3.0),)), []
    )
    for token in (1, 1, 3):
        sampler.accept(token)
    logits[1] -= 1.0 + 2 * 0.5
    logits[3] -= 1.0 + 0.5
    logits[4] += 3.0
    drawn = []
    for seed in range(3000):
        one = Sampler(
            SamplingParams(9, 1.0, seed=seed, logit_bias=((4, 3.0),), presence_penalty=1.0, frequency_penalty=0.5), []
        )
        for token in (1, 1, 3):
            one.accept(token)
        drawn += sample(LOGITS[None], [one])
    assert_drawn_from(naive(logits), drawn)


@pytest.mark.parametrize("ban", [-math.inf, -100.0])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_banned_token_never_comes(ban, temperature):
    bans = tuple((token, ban) for token in (1, 3, 0))
    assert set(tokens(LOGITS, 300, temperature=temperature, logit_bias=bans)) <= {2, 4}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_bans_of_every_token_have_no_effect(temperature):
    bans = tuple((token, -math.inf) for token in range(5))
    free = tokens(LOGITS, 50, temperature=temperature)
    assert tokens(LOGITS, 50, temperature=temperature, logit_bias=bans) == free
    assert tokens(LOGITS, 50, temperature=temperature, stop_ids=(0, 1, 2, 3, 4), min_tokens=50) == free


def test_stop_tokens_come_only_after_min_tokens():
    answer = tokens(LOGITS, 6, stop_ids=(1, 3, 99), min_tokens=4)
    assert answer == [0, 0, 0, 0, 1, 1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_broken_rows_give_no_token_and_other_rows_do(broken, temperature):
    logits = LOGITS.repeat(4, 1)
    logits[1, 2] = broken
    logits[2] = -math.inf
    logits[3, 1] = -math.inf
    rows = [Sampler(SamplingParams(9, temperature, seed=1), []) for _ in range(4)]
    got = sample(logits, rows)
    assert [token is None for token in got] == [False, True, True, False]
    assert got[3] != 1


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.integers(1, 40).flatmap(
        lambda width: st.lists(
            st.lists(st.sampled_from([0.0, 1.0, -1.0, math.nan, math.inf, -math.inf]), min_size=width, max_size=width),
            max_size=6,
        )
    )
)
def test_the_argmax_for_a_gpu_equals_greedy_sampling(rows):
    logits = torch.tensor(rows or [[0.0]])[: len(rows)]
    assert argmax_by_torch(logits) == sample(logits, [Sampler(SamplingParams(9), []) for _ in rows])


def test_greedy_rows_use_the_argmax_for_a_gpu_and_others_are_sampled(monkeypatch):
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    logits[4, 7] = math.nan
    sampled = [SamplingParams(9), SamplingParams(9, 1.0, seed=1), SamplingParams(9, logit_bias=((3, 99.0),))] * 2
    due = sample(logits, [Sampler(one, []) for one in sampled])
    monkeypatch.setattr(sampling, "_argmax_by_numpy", argmax_by_torch)
    assert sample(logits, [Sampler(one, []) for one in sampled]) == due
    assert due[2] == 3 and due[4] is None


def test_logprobs_are_natural_and_sum_to_one():
    first, second = token_logprobs(LOGITS.repeat(2, 1), [3, 1], [20, 2])
    assert [token for token, _ in first.top] == [1, 3, 0, 2, 4]
    assert sum(math.exp(logprob) for _, logprob in first.top) == pytest.approx(1.0)
    assert first.token == 3 and first.logprob == first.top[1][1]
    assert second.top == first.top[:2] and second.logprob == first.top[0][1]
    assert token_logprobs(LOGITS[None], [4], [0])[0].top == ()


def test_logprobs_of_a_row_do_not_depend_on_the_others():
    logits = torch.randn(33, 1003, generator=torch.Generator().manual_seed(2)).round(decimals=1)
    chosen, tops = list(range(33)), [row % 21 for row in range(33)]
    together = token_logprobs(logits, chosen, tops)
    assert together == [token_logprobs(logits[row : row + 1], [row], [row % 21])[0] for row in range(33)]
    due = logits.double().log_softmax(-1)
    assert [entry.logprob for entry in together] == pytest.approx([float(due[row, row]) for row in range(33)], abs=1e-5)
