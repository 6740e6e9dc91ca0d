"""The sampler for GPUs, here on CPU tensors, against the host's sampler and the distributions that both document."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loramill.serve.engine import SamplingParams, model_runner
from loramill.serve.engine.sampling import device_sampler
from loramill.serve.engine.sampling.device_sampler import DeviceSampler, best_tokens, tokens_at
from loramill.serve.engine.sampling.sampler import Sampler, sample

from .distributions import KNOBS, LOGITS, MIXED, assert_drawn_from, naive, oracle

CPU = torch.device("cpu")


class Bits:
    """A mask that allows the tokens of one residue class of the answer's length."""

    finished, error = False, None

    def __init__(self, vocabulary, classes=3):
        self.vocabulary, self.classes, self.length = vocabulary, classes, 0

    def allowed_bits(self):
        allowed = np.arange(self.vocabulary) % self.classes == self.length % self.classes
        return np.packbits(allowed, bitorder="little")

    def accept(self, token):
        self.length += 1


def on_device(logits, samplers, device_sampler=None) -> list[int | None]:
    chosen = (device_sampler or DeviceSampler(logits.shape[1], CPU)).sample(logits, samplers)
    assert chosen.dtype == torch.int64 and chosen.shape == (len(samplers),)
    return [None if token < 0 else token for token in chosen.tolist()]


def drawn(logits, count, **knobs) -> list[int]:
    """The first tokens of `count` answers with different seeds."""
    samplers = [Sampler(SamplingParams(9, seed=seed, **knobs), ()) for seed in range(count)]
    return on_device(logits.expand(count, -1), samplers)


GREEDY = st.fixed_dictionaries(
    {},
    optional={
        "repetition_penalty": st.floats(0.3, 3.0),
        "presence_penalty": st.floats(-2.0, 2.0),
        "frequency_penalty": st.floats(-2.0, 2.0),
        "logit_bias": st.dictionaries(st.integers(0, 18), st.floats(-9.0, 9.0) | st.just(-np.inf), max_size=19).map(
            lambda bias: tuple(bias.items())
        ),
        "min_tokens": st.integers(0, 6),
        "stop_ids": st.sets(st.integers(0, 30), max_size=20).map(tuple),
    },
)


@settings(max_examples=80, derandomize=True)
@given(st.lists(st.tuples(GREEDY, st.booleans()), min_size=1, max_size=6), st.integers(0, 2**32))
def test_greedy_tokens_are_the_hosts_under_all_changes(rows, seed):
    generator, draw = torch.Generator().manual_seed(seed), random.Random(seed)

    def new(knobs, masked):
        params = SamplingParams(12, **knobs)
        return Sampler(params, [2, 3, 3], mask=Bits(19) if masked else None)

    samplers, shared = [new(*row) for row in rows], DeviceSampler(19, CPU)
    for _ in range(8):
        # Some rows pause, and some end and leave their place to others.
        for index in range(len(samplers)):
            if draw.random() < 0.15:
                samplers[index] = new(*rows[draw.randrange(len(rows))])
        running = [sampler for sampler in samplers if draw.random() < 0.8]
        logits = torch.randn(len(running), 19, generator=generator) * 3
        if running and draw.random() < 0.2:
            logits[draw.randrange(len(running)), draw.randrange(19)] = draw.choice([np.nan, np.inf, -np.inf])
        before = logits.clone()
        if running:
            chosen = on_device(logits, running, shared)
            assert chosen == sample(logits, running)
            assert torch.equal(logits.nan_to_num(7.0), before.nan_to_num(7.0))
            for sampler, token in zip(running, chosen, strict=True):
                for _ in range(draw.choice([1, 1, 1, 2])):
                    sampler.accept(draw.randrange(19) if token is None or draw.random() < 0.3 else token)


@pytest.mark.parametrize("knobs", [{}, {"temperature": 0.4}, {"temperature": 3.0}, {"top_k": 1}, {"top_k": 40}])
@pytest.mark.parametrize(("vocabulary", "spread"), [(2, 1.0), (257, 3.0), (5000, 0.05), (5000, 4.0)])
def test_tokens_drawn_by_temperature_and_top_k_are_the_hosts(vocabulary, spread, knobs):
    generator = torch.Generator().manual_seed(vocabulary)
    params = {"temperature": 1.0, **knobs}
    samplers = [Sampler(SamplingParams(9, seed=seed, **params), ()) for seed in range(200)]
    for sampler in samplers[:50]:
        sampler.accept(0)
    logits = torch.randn(200, vocabulary, generator=generator) * spread
    got, due = on_device(logits, samplers), sample(logits, samplers)
    # Only the rounding of exponentials differs.
    assert sum(a != b for a, b in zip(got, due, strict=True)) <= 1


def test_random_numbers_are_the_hosts():
    samplers = [Sampler(SamplingParams(9, 1.0, seed=seed), ()) for seed in (0, -1, 7, 2**63 - 1, -(2**63))]
    for sampler in samplers[1:]:
        for _ in range(1000):
            sampler.accept(0)
    # With equal weights of 2^16 tokens, a token is the first 16 bits of its number.
    flat = torch.zeros(5, 2**16)
    assert on_device(flat, samplers) == sample(flat, samplers)


@pytest.mark.parametrize("knobs", KNOBS)
def test_tokens_are_as_frequent_as_in_the_distribution(knobs):
    assert_drawn_from(oracle(LOGITS, **knobs), drawn(LOGITS, 2000, **{"temperature": 1.0, **knobs}))


@settings(max_examples=40, derandomize=True)
@given(
    vocabulary=st.integers(2, 700),
    spread=st.sampled_from([0.0, 0.1, 1.0, 4.0]),
    temperature=st.floats(0.05, 5.0),
    top_k=st.one_of(st.just(0), st.integers(1, 800)),
    top_p=st.one_of(st.just(1.0), st.floats(0.01, 1.0)),
    min_p=st.one_of(st.just(0.0), st.floats(0.0, 1.0)),
)
def test_any_distribution_is_drawn_from(vocabulary, spread, **knobs):
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(vocabulary)) * spread
    assert_drawn_from(naive(logits, **knobs), drawn(logits, 500, **knobs))


@settings(max_examples=60, derandomize=True)
@given(st.integers(1, 600), st.sampled_from([1, 3, 40]), st.floats(0.0, 1.2), st.booleans(), st.integers(0, 999))
def test_the_best_tokens_are_those_of_a_sort(vocabulary, levels, fraction, counts, seed):
    draw = np.random.default_rng(seed)
    values = np.round(draw.random((3, vocabulary)) * levels).astype(np.float32) / levels
    order = torch.from_numpy(values).view(torch.int32)
    amounts = torch.ones_like(order, dtype=torch.int64) if counts else (torch.from_numpy(values) * 2**40).long()
    limits = (amounts.sum(1, keepdim=True) * fraction).long().clamp_(min=1)
    kept = best_tokens(order, amounts, limits)
    for row in range(3):
        by_rank = np.argsort(-values[row], kind="stable")
        sizes = amounts[row].numpy()[by_rank]
        due = by_rank[sizes.cumsum() - sizes < int(limits[row])]
        # Tokens without an amount are of no consequence.
        due = {token for token in due.tolist() if amounts[row, token]}
        assert {token for token in kept[row].nonzero().flatten().tolist() if amounts[row, token]} == due


@settings(max_examples=60, derandomize=True)
@given(st.integers(1, 1030), st.floats(0.0, 1.0, exclude_max=True), st.floats(0.0, 1.0), st.integers(0, 999))
def test_a_token_is_where_the_cumulated_weights_pass_the_number(vocabulary, number, zeros, seed):
    draw = np.random.default_rng(seed)
    weights = draw.integers(0, 2**40, vocabulary) * (draw.random(vocabulary) >= zeros)
    (token,) = tokens_at(torch.tensor([[number]]), torch.from_numpy(weights)[None])[0].tolist()
    steps = weights.cumsum()
    if steps[-1]:
        assert token == steps.searchsorted(min(int(number * steps[-1]), int(steps[-1]) - 1), "right")
        assert weights[token]
    assert 0 <= token < vocabulary


def test_equal_tokens_are_kept_by_their_ids():
    flat = torch.zeros(8)
    assert set(drawn(flat, 200, temperature=1.0, top_k=3)) == {0, 1, 2}
    assert set(drawn(flat, 200, temperature=1.0, top_p=0.5)) == {0, 1, 2, 3}
    assert set(drawn(flat, 200, temperature=1.0, top_k=4, top_p=0.5)) == {0, 1}


@pytest.mark.parametrize("size", [1, 5, 64])
def test_a_row_does_not_depend_on_the_others(monkeypatch, size):
    generator, draw = torch.Generator().manual_seed(size), random.Random(size)

    def samplers():
        return [
            Sampler(SamplingParams(9, seed=seed, **knobs), [0, 1], mask=Bits(1000) if masked else None)
            for seed, knobs in enumerate(MIXED)
            for masked in (False, True)
        ]

    together, alone, some = samplers(), samplers(), samplers()
    shared, partial = DeviceSampler(1000, CPU), DeviceSampler(1000, CPU)
    # Batches beyond this many rows are sampled in several slices.
    monkeypatch.setattr(shared, "_rows_at_once", size)
    for _ in range(5):
        logits = torch.randn(len(together), 1000, generator=generator) * 3
        logits[draw.randrange(len(together))] = torch.nan
        chosen = on_device(logits, together, shared)
        assert chosen.count(None) == 1
        assert chosen == [on_device(row[None], [one])[0] for row, one in zip(logits, alone, strict=True)]
        rows = draw.sample(range(len(together)), draw.randint(1, len(together)))
        assert on_device(logits[rows], [some[row] for row in rows], partial) == [chosen[row] for row in rows]
        for sampler, token in zip(together + alone + some, chosen * 3, strict=True):
            sampler.accept(0 if token is None else token)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("broken", [np.nan, np.inf])
@pytest.mark.parametrize("knobs", [{}, {"top_p": 0.5}, {"top_k": 2, "min_p": 0.1}, {"presence_penalty": 1.0}])
def test_broken_rows_give_no_token_and_other_rows_do(broken, temperature, knobs):
    logits = LOGITS.repeat(4, 1)
    logits[1, 2] = broken
    logits[2] = -torch.inf
    logits[3, 1] = -torch.inf
    rows = [Sampler(SamplingParams(9, temperature, seed=1, **knobs), []) for _ in range(4)]
    got = on_device(logits, rows)
    assert [token is None for token in got] == [False, True, True, False]
    assert got[3] != 1
    assert got[0] == on_device(LOGITS[None], rows[:1])[0]


def test_a_mask_that_leaves_only_impossible_tokens_gives_no_token():
    sampler = Sampler(SamplingParams(9, logit_bias=((5, 9.0),)), (), mask=Bits(101))
    logits = torch.zeros(1, 101)
    logits[0, ::3] = -torch.inf
    assert on_device(logits, [sampler]) == [None]


def test_places_of_ended_answers_are_used_again():
    shared = DeviceSampler(16, CPU)
    for count in (3, 1, 2, 3):
        samplers = [Sampler(SamplingParams(9, logit_bias=((row, 9.0),)), ()) for row in range(count)]
        assert on_device(torch.zeros(count, 16), samplers, shared) == list(range(count))
        del samplers
        shared.sample(torch.zeros(1, 16), [Sampler(SamplingParams(9), ())])
    assert len(shared._shifts._amounts) == 3


def test_parameters_are_copied_only_when_the_rows_change(monkeypatch):
    copies = []
    to_device = device_sampler.to_device
    monkeypatch.setattr(
        device_sampler, "to_device", lambda array, device: copies.append(array.nbytes) or to_device(array, device)
    )
    samplers = [Sampler(SamplingParams(9, 1.0, seed=row), ()) for row in range(7)]
    shared = DeviceSampler(50, CPU)
    shared.sample(torch.zeros(7, 50), samplers)
    copies.clear()
    shared.sample(torch.zeros(7, 50), samplers)
    # One random number per row.
    assert copies == [7 * 8]
    shared.sample(torch.zeros(6, 50), samplers[:6])
    assert len(copies) > 2


@pytest.mark.parametrize("name", ["greedy", "drawn"])
def test_an_engine_answers_alike_with_either_sampler(drive, prompts, monkeypatch, name):
    sampling = {
        "greedy": {"repetition_penalty": 1.3, "frequency_penalty": 0.2, "logit_bias": ((5, 1.0),)},
        "drawn": {"temperature": 0.8, "seed": 3},
    }[name]

    def answers():
        driver = drive(max_sequences=3)
        for number, (version, prompt) in enumerate(prompts.items()):
            driver.submit(str(number), prompt, version, n=2, logprobs=2, **sampling)
        return driver.finish()

    due = answers()
    made = []

    def sample_on_device(logits, samplers):
        made.append(DeviceSampler(logits.shape[1], CPU) if not made else made[0])
        return on_device(logits, samplers, made[0])

    monkeypatch.setattr(model_runner, "sample", sample_on_device)
    assert answers() == due
    assert made


@pytest.mark.gpu
class TestOnAGPU:
    def rows(self, count, vocabulary=128_256):
        return [
            Sampler(
                SamplingParams(9, seed=row, **MIXED[row % 8]), [0, 1], mask=Bits(vocabulary) if row % 5 == 4 else None
            )
            for row in range(count)
        ]

    def test_tokens_are_those_of_the_cpu_and_of_any_batch(self):
        cuda = torch.device("cuda")
        logits = torch.randn(96, 128_256, generator=torch.Generator().manual_seed(0)) * 3
        got = DeviceSampler(128_256, cuda).sample(logits.cuda(), self.rows(96)).tolist()
        due = DeviceSampler(128_256, CPU).sample(logits, self.rows(96)).tolist()
        assert sum(a != b for a, b in zip(got, due, strict=True)) <= 1
        for count in (1, 2, 17, 64):
            assert DeviceSampler(128_256, cuda).sample(logits[:count].cuda(), self.rows(count)).tolist() == got[:count]

    def test_the_host_does_not_wait(self):
        cuda = torch.device("cuda")
        logits, shared, rows = torch.randn(40, 5000, device=cuda), DeviceSampler(5000, cuda), self.rows(40, 5000)
        shared.sample(logits, rows)
        for row in rows:
            row.accept(1)
        torch.cuda.set_sync_debug_mode("error")
        try:
            shared.sample(logits, rows)
            shared.sample(logits[:39], rows[:39])
        finally:
            torch.cuda.set_sync_debug_mode("default")
