"""Chooses the examples of each step, and lays them out as rows of tokens.

The order is a pure function of (seed, number of examples, step), so a resumed job needs no state of its data.

Rows are *packed*: examples follow one another without padding, and the prefix that all of their prompts share (a system
prompt, the template's opening) occurs once, in front. Each token attends to that prefix and to the earlier tokens of
its own example, at the positions that it would have alone, so the arithmetic is that of separate examples. Without
packing, each example is a row by itself, padded to the longest.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile

import torch

from loramill.data.encoding import EncodedExample, TrainingExample

#: Fewer targets than this are filled up by copies of one, with a weight of 0. MKL computes products of one to three
#: rows in other ways than those of more, and a row then has other bits than in a larger pass.
MIN_TARGETS = 4


@dataclass(frozen=True, slots=True)
class PackedRows:
    """Some examples as R rows of T tokens; S tokens are supervised.

    Attributes:
        tokens, positions: int64 [R, T].
        prefix_tokens: tokens of the prefix that all examples share, in front of the row; 0 if R > 1.
        example_tokens: tokens of each example in the order of the rows, without the prefix and with padding.
        target_positions: int64 [S]; positions in the flattened rows [R * T] at which supervised tokens are predicted.
        labels: int64 [S]; the supervised tokens.
        weights: float64 [S]; weights of their losses.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    prefix_tokens: int
    example_tokens: tuple[int, ...]
    target_positions: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor

    def attention_mask(self, window: int | None = None) -> torch.Tensor:
        """bool [R, T, T]; whether the token of a line attends to the token of a column.

        Args:
            window: number of positions that a token attends to at most, its own included; None: all earlier ones.
        """
        rows, width = self.tokens.shape
        if rows > 1:
            seen = torch.ones(width, width, dtype=torch.bool).tril().expand(rows, -1, -1)
        else:
            sizes = torch.tensor([self.prefix_tokens, *self.example_tokens])
            example_of = torch.arange(len(sizes)).repeat_interleave(sizes)  # 0 for the prefix
            same = (example_of[:, None] == example_of) | (example_of == 0)
            seen = same.tril()[None]
        return seen if window is None else seen & (self.positions[:, :, None] - self.positions[:, None] < window)

    def added_mask(self, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """`attention_mask` as it is added to scores, [R, 1, T, T]: 0 where a token attends to another, else -inf."""
        seen = self.attention_mask(window)
        return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, -math.inf)[:, None]


def choose_batch(count: int, batch_size: int, step: int, seed: int, *, epochs: bool = False) -> list[int]:
    """Returns the indices of the examples, of `count`, that step `step` (from 0) trains on.

    Steps walk through one shuffle of all examples after another: every example is seen once before any is seen again.

    Args:
        batch_size: examples per step.
        epochs: end each epoch with a step of the examples that are left, instead of filling it from the next epoch.
    """
    if epochs:
        epoch, batch = divmod(step, -(-count // batch_size))
        return _shuffled(count, seed, epoch)[batch * batch_size : (batch + 1) * batch_size]
    walk = range(step * batch_size, (step + 1) * batch_size)
    return [_shuffled(count, seed, index // count)[index % count] for index in walk]


@lru_cache(maxsize=2)
def _shuffled(count: int, seed: int, epoch: int) -> list[int]:
    return random.Random(f"{seed}/{epoch}").sample(range(count), count)


def group_for_passes(
    examples: Sequence[EncodedExample],
    max_tokens: int,
    *,
    packing: bool = True,
    multiple_of: int = 1,
    window: int | None = None,
) -> list[list[EncodedExample]]:
    """Splits `examples` into groups, one per forward pass.

    Args:
        max_tokens: about the number of tokens in a group; with packing without the shared prefix, else with padding.
        multiple_of: the number of groups is a multiple of this, if there are enough examples. Only with packing.
        window: as of `pack`.
    """
    units = [(example,) for example in examples]
    groups = group_units(units, max_tokens, packing=packing, multiple_of=multiple_of, window=window)
    return [[examples[index] for index in group] for group in groups]


def group_units(
    units: Sequence[Sequence[EncodedExample]],
    max_tokens: int,
    *,
    packing: bool = True,
    multiple_of: int = 1,
    window: int | None = None,
) -> list[list[int]]:
    """Splits units, whose examples are not split, into groups of their indices; arguments as of `group_for_passes`."""
    if packing:
        prefix = shared_prefix_length([example for unit in units for example in unit], window)
        lengths = [sum(len(example.tokens) - prefix for example in unit) for unit in units]
        return _group_evenly(lengths, max_tokens, multiple_of)
    groups: list[list[int]] = []
    rows = width = 0
    for index, unit in enumerate(units):
        rows, width = rows + len(unit), max(width, *(len(example.tokens) for example in unit))
        if groups and rows * width <= max_tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
            rows, width = len(unit), max(len(example.tokens) for example in unit)
    return groups


def _group_evenly(lengths: Sequence[int], max_tokens: int, multiple_of: int) -> list[list[int]]:
    count = -(-sum(lengths) // (max_tokens * multiple_of)) * multiple_of
    tokens_per_group = sum(lengths) / count
    groups: list[list[int]] = []
    before = 0
    for index, length in enumerate(lengths):
        if before >= len(groups) * tokens_per_group:
            groups.append([])
        groups[-1].append(index)
        before += length
    return groups


def pack(examples: Sequence[EncodedExample], window: int | None = None) -> PackedRows:
    """Lays `examples` out as one packed row.

    Args:
        window: number of tokens that a token attends to at most, where attention is limited by distances within the
            row: behind a shared prefix these are not those within an example.
    """
    prefix = shared_prefix_length(examples, window)
    tokens = list(examples[0].tokens[:prefix])
    positions = list(range(prefix))
    targets: list[tuple[int, int, float]] = []
    for example in examples:
        targets += _supervised_targets(example, len(tokens) - prefix)
        tokens += example.tokens[prefix:]
        positions += range(prefix, len(example.tokens))
    return _packed_rows([tokens], [positions], prefix, [len(example.tokens) - prefix for example in examples], targets)


def pad(examples: Sequence[EncodedExample]) -> PackedRows:
    """Lays each of `examples` out as one row, padded with zeros."""
    width = max(len(example.tokens) for example in examples)
    tokens = [[*example.tokens, *[0] * (width - len(example.tokens))] for example in examples]
    targets = [target for row, example in enumerate(examples) for target in _supervised_targets(example, row * width)]
    return _packed_rows(tokens, [list(range(width))] * len(examples), 0, [width] * len(examples), targets)


def shared_prefix_length(examples: Sequence[EncodedExample], window: int | None = None) -> int:
    """Returns the length of the prefix that all `examples` share; it ends before the first supervised prediction.

    It is 0 if an example is longer than the attention window.
    """
    if window is not None and max(len(example.tokens) for example in examples) > window:
        return 0
    longest = min(max(1, example.spans[0].start) for example in examples) - 1
    columns = zip(*(example.tokens[:longest] for example in examples), strict=True)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))


def sequences(examples: Iterable[TrainingExample]) -> list[EncodedExample]:
    """Returns the sequences of `examples`: one each, two of a pair, or several if an answer can't follow another."""
    return [sequence for example in examples for sequence in example.sequences]


def count_supervised_tokens(example: EncodedExample) -> int:
    """Returns how many tokens of the example have a loss."""
    return len(_supervised_targets(example, 0))


def supervised_weight(example: EncodedExample) -> float:
    """Returns the sum of the weights of the example's losses."""
    return sum(weight for _, _, weight in _supervised_targets(example, 0))


def _supervised_targets(example: EncodedExample, shift: int) -> list[tuple[int, int, float]]:
    """Per supervised token: the position that predicts it, plus `shift`; the token; its weight."""
    return [
        (shift + index - 1, example.tokens[index], span.weight)
        for span in example.spans
        for index in range(max(1, span.start), span.stop)  # nothing predicts token 0
    ]


def _packed_rows(
    tokens: list[list[int]],
    positions: list[list[int]],
    prefix_tokens: int,
    example_tokens: list[int],
    targets: list[tuple[int, int, float]],
) -> PackedRows:
    copies = [(position, label, 0.0) for position, label, _ in targets[:1]] * (MIN_TARGETS - len(targets))
    targets = [*targets, *copies]
    return PackedRows(
        tokens=torch.tensor(tokens),
        positions=torch.tensor(positions),
        prefix_tokens=prefix_tokens,
        example_tokens=tuple(example_tokens),
        target_positions=torch.tensor([position for position, _, _ in targets]),
        labels=torch.tensor([label for _, label, _ in targets]),
        weights=torch.tensor([weight for _, _, weight in targets], dtype=torch.float64),
    )
