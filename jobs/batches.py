"""Which examples a step trains on, and how they are laid out as rows of tokens.

The order is a pure function of (seed, number of examples, step), so a resumed job needs no state of its data.

A row is *packed*: the examples stand one after another without padding, and what all of their prompts begin with
(a system prompt, the template's opening) stands only once, in front. Each token sees that prefix and the earlier
tokens of its own example, at the positions it would have alone, so the arithmetic is that of separate examples.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile

import torch

from loramill.chat import EncodedExample


@dataclass(frozen=True, slots=True)
class Row:
    """Some examples as one sequence of T tokens, S of which are supervised.

    Attributes:
        tokens, positions: int64 [1, T].
        sees: bool [T, T]; whether the token of a line attends to the token of a column.
        predicting: int64 [S]; where in the row the supervised tokens are predicted.
        labels: int64 [S]; the supervised tokens.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    sees: torch.Tensor
    predicting: torch.Tensor
    labels: torch.Tensor


def choose(count: int, size: int, step: int, seed: int) -> list[int]:
    """The indices of the `size` examples, of `count`, that step `step` (from 0) trains on.

    Steps walk through one shuffle of all examples after another: every example is seen once before any is seen again.
    """
    walk = range(step * size, (step + 1) * size)
    return [_shuffled(count, seed, place // count)[place % count] for place in walk]


@lru_cache(maxsize=2)
def _shuffled(count: int, seed: int, epoch: int) -> list[int]:
    return random.Random(f"{seed}/{epoch}").sample(range(count), count)


def split(examples: Sequence[EncodedExample], limit: int) -> list[list[EncodedExample]]:
    """Cuts `examples` into the fewest even groups of about `limit` tokens each, besides the prefix they share."""
    prefix = shared_prefix(examples)
    lengths = [len(example.tokens) - prefix for example in examples]
    share = sum(lengths) / -(-sum(lengths) // limit)
    groups: list[list[EncodedExample]] = []
    before = 0
    for example, length in zip(examples, lengths, strict=True):
        if before >= len(groups) * share:
            groups.append([])
        groups[-1].append(example)
        before += length
    return groups


def pack(examples: Sequence[EncodedExample]) -> Row:
    """Lays `examples` out as one row."""
    prefix = shared_prefix(examples)
    tokens = list(examples[0].tokens[:prefix])
    positions = list(range(prefix))
    owners = [0] * prefix
    predicting: list[int] = []
    labels: list[int] = []
    for owner, example in enumerate(examples, start=1):
        shift = len(tokens) - prefix
        first = first_supervised(example)
        predicting += range(shift + first - 1, shift + len(example.tokens) - 1)
        labels += example.tokens[first:]
        tokens += example.tokens[prefix:]
        positions += range(prefix, len(example.tokens))
        owners += [owner] * (len(example.tokens) - prefix)
    owner_of = torch.tensor(owners)
    same = (owner_of[:, None] == owner_of) | (owner_of == 0)
    return Row(
        tokens=torch.tensor([tokens]),
        positions=torch.tensor([positions]),
        sees=same.tril(),
        predicting=torch.tensor(predicting),
        labels=torch.tensor(labels),
    )


def shared_prefix(examples: Sequence[EncodedExample]) -> int:
    """How many tokens all of `examples` begin with, short of the place where the first supervised one is predicted."""
    longest = min(first_supervised(example) for example in examples) - 1
    columns = zip(*(example.tokens[:longest] for example in examples), strict=True)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))


def first_supervised(example: EncodedExample) -> int:
    """Index of the first token with a loss. Nothing predicts token 0."""
    return max(1, example.prompt_length)


def supervised(example: EncodedExample) -> int:
    """How many tokens of the example have a loss."""
    return max(0, len(example.tokens) - first_supervised(example))
