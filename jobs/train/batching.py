"""Which examples a step trains on, and how they are laid out as rows of tokens.

The order is a pure function of (seed, number of examples, step), so a resumed job needs no state of its data.

Rows are *packed*: the examples stand one after another without padding, and what all of their prompts begin with
(a system prompt, the template's opening) stands only once, in front. Each token sees that prefix and the earlier
tokens of its own example, at the positions it would have alone, so the arithmetic is that of separate examples.
Without packing, each example is a row of its own, padded to the longest.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile

import torch

from loramill.data.tokenizer import EncodedExample


@dataclass(frozen=True, slots=True)
class Rows:
    """Some examples as R sequences of T tokens, S of which are supervised.

    Attributes:
        tokens, positions: int64 [R, T].
        sees: bool [R, T, T]; whether the token of a line attends to the token of a column.
        predicting: int64 [S]; where in the R * T places, row after row, the supervised tokens are predicted.
        labels: int64 [S]; the supervised tokens.
        weights: float64 [S]; of their losses.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    sees: torch.Tensor
    predicting: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor


def choose(count: int, size: int, step: int, seed: int, *, epochs: bool = False) -> list[int]:
    """The indices of the examples, of `count`, that step `step` (from 0) trains on.

    Steps walk through one shuffle of all examples after another: every example is seen once before any is seen again.

    Args:
        size: examples in a step.
        epochs: end each epoch with a step of the examples that are left, instead of filling it from the next epoch.
    """
    if epochs:
        epoch, batch = divmod(step, -(-count // size))
        return _shuffled(count, seed, epoch)[batch * size : (batch + 1) * size]
    walk = range(step * size, (step + 1) * size)
    return [_shuffled(count, seed, place // count)[place % count] for place in walk]


@lru_cache(maxsize=2)
def _shuffled(count: int, seed: int, epoch: int) -> list[int]:
    return random.Random(f"{seed}/{epoch}").sample(range(count), count)


def grouped(
    examples: Sequence[EncodedExample], limit: int, *, packing: bool = True, parts: int = 1
) -> list[list[EncodedExample]]:
    """Cuts `examples` into groups, one for each forward pass; a multiple of `parts`, where there are enough examples.

    Args:
        limit: about as many tokens in a group: besides the prefix they share; without packing, padding included.
    """
    if packing:
        return _even(examples, limit, parts)
    groups: list[list[EncodedExample]] = []
    for example in examples:
        if groups and max(len(other.tokens) for other in (*groups[-1], example)) * (len(groups[-1]) + 1) <= limit:
            groups[-1].append(example)
        else:
            groups.append([example])
    return groups


def _even(examples: Sequence[EncodedExample], limit: int, parts: int) -> list[list[EncodedExample]]:
    prefix = shared_prefix(examples)
    lengths = [len(example.tokens) - prefix for example in examples]
    count = -(-sum(lengths) // (limit * parts)) * parts
    share = sum(lengths) / count
    groups: list[list[EncodedExample]] = []
    before = 0
    for example, length in zip(examples, lengths, strict=True):
        if before >= len(groups) * share:
            groups.append([])
        groups[-1].append(example)
        before += length
    return groups


def pack(examples: Sequence[EncodedExample]) -> Rows:
    """Lays `examples` out as one row."""
    prefix = shared_prefix(examples)
    tokens = list(examples[0].tokens[:prefix])
    positions = list(range(prefix))
    owners = [0] * prefix
    learnt: list[tuple[int, int, float]] = []
    for owner, example in enumerate(examples, start=1):
        learnt += _learnt(example, len(tokens) - prefix)
        tokens += example.tokens[prefix:]
        positions += range(prefix, len(example.tokens))
        owners += [owner] * (len(example.tokens) - prefix)
    owner_of = torch.tensor(owners)
    same = (owner_of[:, None] == owner_of) | (owner_of == 0)
    return _rows([tokens], [positions], same.tril()[None], learnt)


def pad(examples: Sequence[EncodedExample]) -> Rows:
    """Lays each of `examples` out as a row of its own, with zeros after the shorter ones."""
    width = max(len(example.tokens) for example in examples)
    tokens = [[*example.tokens, *[0] * (width - len(example.tokens))] for example in examples]
    learnt = [place for row, example in enumerate(examples) for place in _learnt(example, row * width)]
    sees = torch.ones(width, width, dtype=torch.bool).tril().expand(len(examples), -1, -1)
    return _rows(tokens, [list(range(width))] * len(examples), sees, learnt)


def shared_prefix(examples: Sequence[EncodedExample]) -> int:
    """How many tokens all of `examples` begin with, short of the place where the first supervised one is predicted."""
    longest = min(max(1, example.spans[0].start) for example in examples) - 1
    columns = zip(*(example.tokens[:longest] for example in examples), strict=True)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))


def sequences(examples: Iterable[EncodedExample]) -> list[EncodedExample]:
    """The sequences of `examples`: one each, or several if an answer can't follow the one before."""
    return [sequence for example in examples for sequence in example.sequences]


def supervised(example: EncodedExample) -> int:
    """How many tokens of the example have a loss."""
    return len(_learnt(example, 0))


def weight(example: EncodedExample) -> float:
    """The sum of the weights of the example's losses."""
    return sum(weight for _, _, weight in _learnt(example, 0))


def _learnt(example: EncodedExample, shift: int) -> list[tuple[int, int, float]]:
    """Where each supervised token is predicted, `shift` places on, the token, and its weight."""
    return [
        (shift + place - 1, example.tokens[place], span.weight)
        for span in example.spans
        for place in range(max(1, span.start), span.stop)  # nothing predicts token 0
    ]


def _rows(
    tokens: list[list[int]], positions: list[list[int]], sees: torch.Tensor, learnt: list[tuple[int, int, float]]
) -> Rows:
    return Rows(
        tokens=torch.tensor(tokens),
        positions=torch.tensor(positions),
        sees=sees,
        predicting=torch.tensor([place for place, _, _ in learnt]),
        labels=torch.tensor([label for _, label, _ in learnt]),
        weights=torch.tensor([weight for _, _, weight in learnt], dtype=torch.float64),
    )
