"""Order and layout: every example once an epoch, and a packed row that says the same as separate examples."""

from __future__ import annotations

from collections import Counter

import torch
from hypothesis import given
from hypothesis import strategies as st

from loramill.chat import EncodedExample
from loramill.jobs.batches import choose, pack, shared_prefix, split, supervised

sizes = st.integers(1, 40)


@given(count=sizes, size=sizes, seed=st.integers(-5, 5), steps=st.integers(1, 12))
def test_every_example_is_seen_once_before_any_is_seen_again(count: int, size: int, seed: int, steps: int) -> None:
    seen = [index for step in range(steps) for index in choose(count, size, step, seed)]
    assert len(seen) == steps * size
    times = Counter(seen)
    assert max(times.values()) - min(times.get(index, 0) for index in range(count)) <= 1


def test_order_depends_on_seed_and_epoch_alone() -> None:
    epochs = [[index for step in range(4) for index in choose(20, 5, first + step, 3)] for first in (0, 4)]
    assert epochs[0] != epochs[1]
    assert epochs[0] == [index for step in range(10) for index in choose(20, 2, step, 3)]
    assert choose(20, 5, 0, 3) != choose(20, 5, 0, 4)


@st.composite
def examples(draw: st.DrawFn) -> list[EncodedExample]:
    opening = draw(st.lists(st.integers(0, 3), max_size=6))
    drawn = []
    for _ in range(draw(st.integers(1, 12))):
        prompt = opening + draw(st.lists(st.integers(0, 3), max_size=5))
        completion = draw(st.lists(st.integers(0, 3), min_size=0 if len(prompt) > 1 else 2, max_size=6))
        drawn.append(EncodedExample(tuple(prompt + completion), len(prompt)))
    return drawn


@given(examples=examples())
def test_a_row_says_what_its_examples_say(examples: list[EncodedExample]) -> None:
    row = pack(examples)
    tokens, positions = row.tokens[0], row.positions[0]
    learned = []
    for place, label in zip(row.predicting.tolist(), row.labels.tolist(), strict=True):
        visible = row.sees[place].nonzero().flatten()
        assert positions[visible].tolist() == list(range(len(visible)))
        learned.append(((*tokens[visible].tolist(),), label))
    expected = [
        (example.tokens[:place], example.tokens[place])
        for example in examples
        for place in range(max(1, example.prompt_length), len(example.tokens))
    ]
    assert learned == expected
    assert len(expected) == sum(map(supervised, examples))


def test_the_shared_prefix_stands_once() -> None:
    row = pack([EncodedExample((7, 8, 9, tail, 5), 4) for tail in (1, 2, 3)])
    assert row.tokens.tolist() == [[7, 8, 9, 1, 5, 2, 5, 3, 5]]
    assert row.positions.tolist() == [[0, 1, 2, 3, 4, 3, 4, 3, 4]]


def test_equal_prompts_keep_the_place_that_predicts_the_completion() -> None:
    assert shared_prefix([EncodedExample((7, 8, 1), 2), EncodedExample((7, 8, 2), 2)]) == 1


@given(examples=examples(), limit=st.integers(1, 60))
def test_groups_are_few_even_and_whole(examples: list[EncodedExample], limit: int) -> None:
    groups = split(examples, limit)
    assert [example for group in groups for example in group] == examples
    assert all(groups)
    prefix = shared_prefix(examples)
    longest = max(len(example.tokens) for example in examples) - prefix
    for group in groups:
        assert sum(len(example.tokens) - prefix for example in group) < limit + longest


def test_one_long_example_has_a_row_of_its_own() -> None:
    long, short = EncodedExample(tuple(range(900)), 3), EncodedExample((5, 6, 7), 2)
    assert [len(group) for group in split([short, long, short], 256)] == [2, 1]
    assert torch.equal(pack([long]).sees, torch.ones(900, 900, dtype=torch.bool).tril())
