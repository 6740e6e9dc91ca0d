"""Log probabilities, row by row as on a CPU and batched as on a GPU."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loramill.serve.engine.sampling import logprobs
from loramill.serve.engine.sampling.logprobs import batched_logprobs, token_logprobs

from .distributions import LOGITS

both = pytest.mark.parametrize("compute", [token_logprobs, batched_logprobs])


@both
def test_logprobs_are_natural_and_sum_to_one(compute):
    first, second = compute(LOGITS.repeat(2, 1), [3, 1], [20, 2])
    assert [token for token, _ in first.top] == [1, 3, 0, 2, 4]
    assert sum(math.exp(logprob) for _, logprob in first.top) == pytest.approx(1.0)
    assert first.token == 3 and first.logprob == first.top[1][1]
    assert second.top == first.top[:2] and second.logprob == first.top[0][1]
    assert compute(LOGITS[None], [4], [0])[0].top == ()


@both
def test_logprobs_of_a_row_do_not_depend_on_the_others(compute):
    logits = torch.randn(33, 1003, generator=torch.Generator().manual_seed(2)).round(decimals=1)
    chosen, tops = list(range(33)), [row % 21 for row in range(33)]
    together = compute(logits, chosen, tops)
    assert together == [compute(logits[row : row + 1], [row], [row % 21])[0] for row in range(33)]
    due = logits.double().log_softmax(-1)
    assert [entry.logprob for entry in together] == pytest.approx([float(due[row, row]) for row in range(33)], abs=1e-5)


@settings(max_examples=50, derandomize=True)
@given(st.integers(1, 80), st.integers(0, 6), st.integers(0, 999), st.sampled_from([0.0, 1.0, 9.0]))
def test_batched_logprobs_are_those_of_each_row(vocabulary, rows, seed, spread):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocabulary, generator=generator).mul(spread).round(decimals=1)
    tokens = torch.randint(vocabulary, (rows,), generator=generator).tolist()
    tops = torch.randint(21, (rows,), generator=generator).tolist()
    due = token_logprobs(logits, tokens, tops)
    for entry, one, row in zip(batched_logprobs(logits, tokens, tops), due, logits, strict=True):
        assert (entry.token, entry.logprob) == (one.token, one.logprob)
        assert [value for _, value in entry.top] == [value for _, value in one.top]
        # Of equal logits the lower token comes first.
        order = sorted(range(vocabulary), key=lambda token: (-row.log_softmax(-1)[token].item(), token))
        assert [token for token, _ in entry.top] == order[: len(entry.top)]


def test_long_prompts_are_processed_in_slices(monkeypatch):
    logits = torch.randn(23, 50, generator=torch.Generator().manual_seed(1))
    due = batched_logprobs(logits, list(range(23)), [3] * 23)
    monkeypatch.setattr(logprobs, "SLICE_BYTES", 8 * 50 * 4)
    assert batched_logprobs(logits, list(range(23)), [3] * 23) == due
