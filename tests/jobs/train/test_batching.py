"""Order and layout: each example once per epoch, and rows that are equivalent to separate examples."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loramill.data.encoding import EncodedExample, TokenSpan
from loramill.jobs.train.batching import (
    choose_batch,
    count_supervised_tokens,
    group_for_passes,
    pack,
    pad,
    shared_prefix_length,
    supervised_weight,
)
from loramill.submission.defaults import count_steps

sizes = st.integers(1, 40)


@given(count=sizes, size=sizes, seed=st.integers(-5, 5), steps=st.integers(1, 12))
def test_every_example_is_seen_once_before_any_is_seen_again(count: int, size: int, seed: int, steps: int) -> None:
    seen = [index for step in range(steps) for index in choose_batch(count, size, step, seed)]
    assert len(seen) == steps * size
    times = Counter(seen)
    assert max(times.values()) - min(times.get(index, 0) for index in range(count)) <= 1


@given(count=sizes, size=sizes, seed=st.integers(-5, 5), epochs=st.integers(1, 4))
def test_each_epoch_has_every_example_once(count: int, size: int, seed: int, epochs: int) -> None:
    steps = count_steps(1, count, size)
    for epoch in range(epochs):
        batches = [choose_batch(count, size, epoch * steps + step, seed, epochs=True) for step in range(steps)]
        assert [len(batch) for batch in batches] == [size] * (count // size) + [count % size] * (count % size > 0)
        assert sorted(index for batch in batches for index in batch) == list(range(count))
        if count % size == 0:
            assert batches == [choose_batch(count, size, epoch * steps + step, seed) for step in range(steps)]


def test_order_depends_on_seed_and_epoch_alone() -> None:
    epochs = [[index for step in range(4) for index in choose_batch(20, 5, first + step, 3)] for first in (0, 4)]
    assert epochs[0] != epochs[1]
    assert epochs[0] == [index for step in range(10) for index in choose_batch(20, 2, step, 3)]
    assert choose_batch(20, 5, 0, 3) != choose_batch(20, 5, 0, 4)


@st.composite
def examples(draw: st.DrawFn) -> list[EncodedExample]:
    opening = draw(st.lists(st.integers(0, 3), max_size=6))
    weights = st.sampled_from([0.5, 1.0, 3.0])
    drawn = []
    for _ in range(draw(st.integers(1, 12))):
        tokens = opening + draw(st.lists(st.integers(0, 3), max_size=5))
        earlier = []
        for _ in range(draw(st.integers(0, 2))):
            start = len(tokens)
            tokens += draw(st.lists(st.integers(0, 3), min_size=2, max_size=4))
            earlier.append(TokenSpan(start, len(tokens), draw(weights)))
            tokens += draw(st.lists(st.integers(0, 3), min_size=1, max_size=3))
        prompt = len(tokens)
        tokens += draw(st.lists(st.integers(0, 3), min_size=0 if prompt > 1 else 2, max_size=6))
        drawn.append(EncodedExample(tuple(tokens), prompt, draw(weights), tuple(earlier)))
    return drawn


@given(examples=examples(), layout=st.sampled_from([pack, pad]))
def test_rows_contain_the_tokens_of_their_examples(examples: list[EncodedExample], layout: type) -> None:
    rows = layout(examples)
    count, width = rows.tokens.shape
    assert (count, rows.attention_mask().shape) == (1 if layout is pack else len(examples), (count, width, width))
    predicted = []
    for position, label, share in zip(
        rows.target_positions.tolist(), rows.labels.tolist(), rows.weights.tolist(), strict=True
    ):
        row, column = divmod(position, width)
        visible = rows.attention_mask()[row, column].nonzero().flatten()
        assert rows.positions[row, visible].tolist() == list(range(len(visible)))
        predicted.append((tuple(rows.tokens[row, visible].tolist()), label, share))
    expected = [
        (example.tokens[:position], example.tokens[position], span.weight)
        for example in examples
        for span in example.spans
        for position in range(max(1, span.start), span.stop)
    ]
    assert predicted[: len(expected)] == expected
    assert all(share == 0 for *_, share in predicted[len(expected) :]), "copies, where there are few"
    assert len(expected) == sum(map(count_supervised_tokens, examples))
    assert sum(share for *_, share in expected) == pytest.approx(sum(map(supervised_weight, examples)))


def test_the_shared_prefix_occurs_once() -> None:
    row = pack([EncodedExample((7, 8, 9, tail, 5), 4) for tail in (1, 2, 3)])
    assert row.tokens.tolist() == [[7, 8, 9, 1, 5, 2, 5, 3, 5]]
    assert row.positions.tolist() == [[0, 1, 2, 3, 4, 3, 4, 3, 4]]


def test_the_shared_prefix_ends_before_the_first_prediction() -> None:
    assert shared_prefix_length([EncodedExample((7, 8, 1), 2), EncodedExample((7, 8, 2), 2)]) == 1
    earlier = (TokenSpan(1, 2, 1.0),)
    assert shared_prefix_length([EncodedExample((7, 8, 1), 2, earlier=earlier), EncodedExample((7, 8, 2), 2)]) == 0


@given(examples=examples(), limit=st.integers(1, 60), parts=st.integers(1, 4), packing=st.booleans())
def test_groups_are_few_and_even_and_complete(
    examples: list[EncodedExample], limit: int, parts: int, packing: bool
) -> None:
    groups = group_for_passes(examples, limit, packing=packing, multiple_of=parts)
    assert [example for group in groups for example in group] == examples
    assert all(groups)
    prefix = shared_prefix_length(examples)
    longest = max(len(example.tokens) for example in examples) - prefix
    for group in groups:
        if packing:
            assert sum(len(example.tokens) - prefix for example in group) < limit + longest
        else:
            assert len(group) == 1 or max(len(example.tokens) for example in group) * len(group) <= limit


def test_each_process_gets_a_group_if_there_are_enough_examples() -> None:
    equal = [EncodedExample((number, 6, 7, 8), 2) for number in range(8)]
    assert [len(group) for group in group_for_passes(equal, 1000, multiple_of=4)] == [2, 2, 2, 2]
    assert [len(group) for group in group_for_passes(equal, 1000, multiple_of=1)] == [8]


def test_a_long_example_is_a_group_by_itself() -> None:
    long, short = EncodedExample(tuple(range(900)), 3), EncodedExample((5, 6, 7), 2)
    assert [len(group) for group in group_for_passes([short, long, short], 256)] == [2, 1]
    assert torch.equal(pack([long]).attention_mask()[0], torch.ones(900, 900, dtype=torch.bool).tril())
