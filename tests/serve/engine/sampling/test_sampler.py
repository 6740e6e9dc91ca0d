"""The sampler against the distributions that its documentation defines: naive float64, and transformers' processors."""

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import RepetitionPenaltyLogitsProcessor

from loramill.serve.engine import SamplingParams
from loramill.serve.engine.sampling.sampler import Sampler, _mix, sample

from .distributions import KNOBS, LOGITS, MIXED, assert_drawn_from, naive, oracle


def tokens(logits, count, prompt=(), index=0, **knobs) -> list[int]:
    """An answer of `count` tokens, the logits the same at each."""
    sampler = Sampler(SamplingParams(**{"max_tokens": count, "seed": 11, **knobs}), prompt, index)
    answer = []
    for _ in range(count):
        (token,) = sample(logits[None], [sampler])
        sampler.accept(token)
        answer.append(token)
    return answer


@pytest.mark.parametrize("knobs", KNOBS)
def test_tokens_are_as_frequent_as_in_the_distribution(knobs):
    p = oracle(LOGITS, **knobs)
    np.testing.assert_allclose(p, naive(LOGITS, **knobs), atol=1e-12)
    assert_drawn_from(p, tokens(LOGITS, 4000, temperature=knobs.get("temperature", 1.0), **without_t(knobs)))


def without_t(knobs):
    return {name: value for name, value in knobs.items() if name != "temperature"}


@settings(max_examples=40, derandomize=True)
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


@settings(max_examples=60, derandomize=True)
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


@settings(max_examples=60, derandomize=True)
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
