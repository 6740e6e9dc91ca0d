"""Samples tokens of logits on a GPU, all rows at once; only the tokens are copied to the host.

The order of masks, penalties, bias, bans and filters, and the random bits of a token, are those of `sampler`. A row's
token does not depend on the other rows or on their number: weights are integers, and sums of integers are exact in any
order, whatever way a device divides them; the other reductions are maxima, the first of equals. Of the host's sampler,

- tokens of greedy rows are the same, with penalties, bias, bans and masks: each of these is one exactly rounded
  operation per logit;
- tokens drawn by temperature or from the top_k are the same, unless the rounding of exponentials (2^-23) moves a
  token's share of the distribution across the random number (none of 3,072 tokens drawn from 50,000 each), or logits
  equal the k-th;
- tokens drawn with top_p or min_p have the same distribution and are other tokens: the host draws again after a token
  that they exclude, and here they exclude tokens before the draw.

On one device, the same request with the same logits gets the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import pad

from loramill.kernels.memory import to_device
from loramill.serve.engine.sampling.logprobs import SLICE_BYTES
from loramill.serve.engine.sampling.sampler import GREEDY_BELOW, STRIDE, Sampler

#: A weight of 1, that of the most probable token. Tokens of a probability below 2^-40 of its have no weight, and the
#: sum over 2^22 tokens stays below 2^63.
_ONE = 2**40

#: Weights are summed in blocks of this many tokens; a token is then found by its block.
_BLOCK = 256

#: Bits of a float32 weight, which is at most 1, in digits of ten bits.
_DIGITS = (20, 10, 0)
_DIGIT = 1 << 10


class DeviceSampler:
    """Samples for the rows of successive steps; parameters are copied to the device when the rows change.

    Logits of rows with penalties or a bias are changed by a row of amounts (8 bytes per token of the vocabulary) and
    one of seen tokens (1 byte), which stay on the device while their sampler lives and get one entry per accepted
    token.
    """

    def __init__(self, vocabulary: int, device: torch.device) -> None:
        self._vocabulary = vocabulary
        self._device = device
        self._rows_at_once = max(1, SLICE_BYTES // (8 * vocabulary))
        self._shifts = _ShiftTable(vocabulary, device)
        # Of the last step; in slices, which bounds the memory that a step takes.
        self._samplers: list[Sampler] = []
        self._slices: list[_Rows] = []

    @torch.inference_mode()
    def sample(self, logits: torch.Tensor, samplers: list[Sampler]) -> torch.Tensor:
        """Samples a token for each row, without waiting for the device; the samplers do not accept it yet.

        Args:
            logits: float32 [rows, vocabulary] on the device; not modified.
            samplers: One per row.

        Returns:
            int64 [rows] on the device; -1 where the highest allowed logit is not finite.
        """
        size = self._rows_at_once
        if samplers != self._samplers:
            self._samplers = list(samplers)
            slices = [self._samplers[start : start + size] for start in range(0, len(samplers), size)]
            self._slices = [_Rows.of(part, self._vocabulary, self._device) for part in slices]
        if len(self._slices) == 1:
            return self._sample(logits, self._slices[0])
        parts = [logits[start : start + size] for start in range(0, len(samplers), size)]
        return torch.cat(list(map(self._sample, parts, self._slices)))

    def _sample(self, logits: torch.Tensor, rows: _Rows) -> torch.Tensor:
        tokens = logits.argmax(-1, keepdim=True)
        highest = logits.gather(1, tokens)
        found = highest.isfinite()
        changed = self._changed(logits, rows)
        if changed is not logits:
            tokens = changed.argmax(-1, keepdim=True)
            highest = changed.gather(1, tokens)
            # A mask may have left nothing but -inf.
            found &= highest > -torch.inf
        if rows.drawn is not None:
            tokens = tokens.index_copy(0, rows.drawn.rows, _draw(changed, highest, rows.drawn, self._device))
        return torch.where(found, tokens, -1).squeeze(1)

    def _changed(self, logits: torch.Tensor, rows: _Rows) -> torch.Tensor:
        """The logits after masks, penalties, bias and bans; the same tensor if there are none."""
        masked = logits
        if rows.masked is not None:
            allowed = _unpacked([rows.samplers[row] for row in rows.masked.numbers], self._vocabulary, self._device)
            part = masked[rows.masked.on_device].where(allowed, -torch.inf)
            masked = masked.index_copy(0, rows.masked.on_device, part)
        changed = masked
        if rows.shifted is not None:
            part = self._shifts.apply(
                changed[rows.shifted.on_device],
                [rows.samplers[row] for row in rows.shifted.numbers],
            )
            changed = changed.index_copy(0, rows.shifted.on_device, part)
        banned = rows.banned_tokens(self._vocabulary)
        if len(banned):
            where = to_device(banned, self._device)
            changed = changed.index_put((where[0], where[1]), changed.new_full((), -torch.inf))
        if changed is masked:
            return masked
        # If all tokens are banned, the bans are dropped; the mask is not.
        return torch.where(changed.amax(-1, keepdim=True) > -torch.inf, changed, masked)


@dataclass(frozen=True, slots=True)
class _Index:
    """Some rows of a slice, on the host and as int64 on the device."""

    numbers: list[int]
    on_device: torch.Tensor

    @classmethod
    def of(cls, numbers: list[int], device: torch.device) -> _Index | None:
        return cls(numbers, to_device(np.array(numbers, np.int64), device)) if numbers else None


@dataclass(frozen=True, slots=True)
class _Drawn:
    """The rows that are drawn at random; `rows` are those of the slice, all indices of a filter those of these rows.

    Attributes:
        samplers: Of the rows.
        keys: uint64 [rows]: their keys.
        rows: int64 [rows], on the device; so are the next ones.
        temperatures: float32 [rows, 1].
        top_k: The rows with a top_k, and it, int64 [rows, 1]; None if there are none.
        top_p: The rows with a top_p, and it, float64 [rows, 1].
        min_p: float32 [rows, 1]; None if it is 0 in all of them.
    """

    samplers: list[Sampler]
    keys: npt.NDArray[np.uint64]
    rows: torch.Tensor
    temperatures: torch.Tensor
    top_k: tuple[torch.Tensor, torch.Tensor] | None
    top_p: tuple[torch.Tensor, torch.Tensor] | None
    min_p: torch.Tensor | None

    @classmethod
    def of(cls, samplers: Sequence[Sampler], rows: list[int], vocabulary: int, device: torch.device) -> _Drawn | None:
        if not rows:
            return None
        drawn = [samplers[row] for row in rows]

        def column(values: list[float], dtype: npt.DTypeLike) -> torch.Tensor:
            return to_device(np.array(values, dtype)[:, None], device)

        def chosen(
            values: list[float], dtype: npt.DTypeLike, uses: list[bool]
        ) -> tuple[torch.Tensor, torch.Tensor] | None:
            index = _Index.of([row for row, use in enumerate(uses) if use], device)
            if index is None:
                return None
            return index.on_device, column([values[row] for row in index.numbers], dtype)

        params = [sampler.params for sampler in drawn]
        return cls(
            drawn,
            np.array([sampler.key for sampler in drawn], np.uint64),
            to_device(np.array(rows, np.int64), device),
            column([s.temperature for s in params], np.float32),
            chosen([s.top_k for s in params], np.int64, [0 < s.top_k < vocabulary for s in params]),
            chosen([s.top_p for s in params], np.float64, [s.top_p < 1.0 for s in params]),
            column([s.min_p for s in params], np.float32) if any(s.min_p > 0.0 for s in params) else None,
        )

    def uniforms(self) -> npt.NDArray[np.float64]:
        """A number in [0, 1) for each row, float64 [rows, 1]: SplitMix64 at the token's position in the answer."""
        counts = np.array([sampler.sampled_tokens for sampler in self.samplers], np.uint64)
        bits = self.keys + counts * np.uint64(STRIDE)
        bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        bits ^= bits >> np.uint64(31)
        numbers: npt.NDArray[np.float64] = (bits >> np.uint64(11)).astype(np.float64)[:, None] * 2.0**-53
        return numbers


@dataclass(frozen=True, slots=True)
class _Rows:
    """A slice of a step's rows, and what their parameters require; copied to the device once.

    Attributes:
        samplers: One per row.
        masked: Rows with a mask.
        shifted: Rows with penalties or a bias.
        may_ban: Rows with `min_tokens`.
        drawn: Rows that are drawn at random; None: all are greedy.
    """

    samplers: list[Sampler]
    masked: _Index | None
    shifted: _Index | None
    may_ban: list[int]
    drawn: _Drawn | None

    @classmethod
    def of(cls, samplers: list[Sampler], vocabulary: int, device: torch.device) -> _Rows:
        rows = range(len(samplers))
        return cls(
            samplers,
            _Index.of([row for row in rows if samplers[row].mask is not None], device),
            _Index.of([row for row in rows if samplers[row].has_shifts], device),
            [row for row in rows if samplers[row].params.min_tokens],
            _Drawn.of(
                samplers, [row for row in rows if samplers[row].params.temperature >= GREEDY_BELOW], vocabulary, device
            ),
        )

    def banned_tokens(self, vocabulary: int) -> npt.NDArray[np.int64]:
        """Row and token of each ban at this position, int64 [2, bans]."""
        pairs = [
            (row, token) for row in self.may_ban for token in self.samplers[row].banned_tokens if token < vocabulary
        ]
        return np.array(pairs, np.int64).T


class _ShiftTable:
    """What is added to the logits of rows with penalties or a bias, and their seen tokens: a table row per sampler."""

    def __init__(self, vocabulary: int, device: torch.device) -> None:
        self._amounts = torch.zeros(0, vocabulary, dtype=torch.float64, device=device)
        self._seen = torch.zeros(0, vocabulary, dtype=torch.bool, device=device)
        self._penalties = torch.zeros(0, 1, device=device)
        # The table's row of each sampler, and the number of tokens up to which it is filled.
        self._row_of: WeakKeyDictionary[Sampler, int] = WeakKeyDictionary()
        self._filled: WeakKeyDictionary[Sampler, int] = WeakKeyDictionary()

    def apply(self, logits: torch.Tensor, samplers: Sequence[Sampler]) -> torch.Tensor:
        """The changed logits of the samplers' rows."""
        self._update(samplers)
        rows = to_device(np.array([self._row_of[sampler] for sampler in samplers], np.int64), logits.device)
        penalties = self._penalties[rows]
        penalized = torch.where(logits > 0, logits / penalties, logits * penalties)
        return (logits.where(~self._seen[rows], penalized).double() + self._amounts[rows]).float()

    def _update(self, samplers: Sequence[Sampler]) -> None:
        """Writes what the samplers have accepted since the last step, and all of those that are new."""
        device = self._amounts.device
        self._add([sampler for sampler in samplers if sampler not in self._row_of])
        shifts = [(self._row_of[each], each.shifts_since(self._filled.get(each))) for each in samplers]
        seen = [(row, shift.seen) for row, shift in shifts if len(shift.seen)]
        if seen:
            self._seen.index_put_(_pairs(seen, device), torch.ones((), dtype=torch.bool, device=device))
        moved = [(row, shift.shifted, shift.amounts) for row, shift in shifts if len(shift.shifted)]
        if moved:
            amounts = to_device(np.concatenate([amounts for _, _, amounts in moved]), device)
            self._amounts.index_put_(_pairs([(row, tokens) for row, tokens, _ in moved], device), amounts)
        self._filled.update((sampler, sampler.sampled_tokens) for sampler in samplers)

    def _add(self, samplers: Sequence[Sampler]) -> None:
        """Gives new samplers the rows of samplers that are gone, or of a larger table."""
        if not samplers:
            return
        taken = set(self._row_of.values())
        free = [row for row in range(len(taken) + len(samplers)) if row not in taken][: len(samplers)]
        # In this order: if there is no memory, nothing has changed.
        self._grow(free[-1] + 1)
        cleared = to_device(np.array(free, np.int64), self._amounts.device)
        self._amounts.index_fill_(0, cleared, 0.0)
        self._seen.index_fill_(0, cleared, False)
        penalties = np.array([sampler.params.repetition_penalty for sampler in samplers], np.float32)
        self._penalties.index_copy_(0, cleared, to_device(penalties[:, None], self._amounts.device))
        self._row_of.update(zip(samplers, free, strict=True))

    def _grow(self, rows: int) -> None:
        """Makes the table hold a number of rows, twice as many as before at least."""
        more = rows - len(self._amounts)
        if more > 0:
            more = max(more, len(self._amounts))
            tables = self._amounts, self._seen, self._penalties
            self._amounts, self._seen, self._penalties = (pad(table, (0, 0, 0, more)) for table in tables)


def _pairs(
    tokens_of_rows: Sequence[tuple[int, npt.NDArray[np.intp]]], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of (row, token) pairs, on the device."""
    rows = np.repeat([row for row, _ in tokens_of_rows], [len(tokens) for _, tokens in tokens_of_rows])
    pairs = to_device(
        np.stack([rows, np.concatenate([tokens for _, tokens in tokens_of_rows])]).astype(np.int64), device
    )
    return pairs[0], pairs[1]


def _unpacked(samplers: Sequence[Sampler], vocabulary: int, device: torch.device) -> torch.Tensor:
    """The tokens that masks allow, bool [samplers, vocabulary]; the bits are copied at once."""
    bits = np.stack([sampler.mask.allowed_bits() for sampler in samplers if sampler.mask is not None])
    shifts = torch.arange(8, dtype=torch.uint8, device=device)
    return ((to_device(bits, device)[:, :, None] >> shifts) & 1).bool().flatten(1)[:, :vocabulary]


def _draw(logits: torch.Tensor, highest: torch.Tensor, drawn: _Drawn, device: torch.device) -> torch.Tensor:
    """Draws a token for each of the drawn rows, int64 [rows, 1]; any token if the row's logits are not finite.

    Args:
        logits: float32 [rows of the slice, vocabulary], after all changes.
        highest: float32 [rows of the slice, 1].
    """
    if len(drawn.samplers) < len(logits):
        logits, highest = logits[drawn.rows], highest[drawn.rows]
    floats = (logits - highest).div_(drawn.temperatures).exp_().nan_to_num_(0.0)
    weights = (floats * _ONE).long()
    # The order of the bits is that of the numbers, since none is negative.
    order = floats.view(torch.int32)
    if drawn.top_k is not None:
        rows, limits = drawn.top_k
        kept = best_tokens(order[rows], torch.ones_like(weights[rows]), limits)
        weights.index_copy_(0, rows, weights[rows] * kept)
    if drawn.top_p is not None:
        rows, fractions = drawn.top_p
        part = weights[rows]
        limits = (part.sum(-1, keepdim=True) * fractions).ceil().long().clamp_(min=1)
        weights.index_copy_(0, rows, part * best_tokens(order[rows], part, limits))
    if drawn.min_p is not None:
        weights *= floats >= drawn.min_p
    return tokens_at(to_device(drawn.uniforms(), device), weights)


def best_tokens(order: torch.Tensor, amounts: torch.Tensor, limits: torch.Tensor) -> torch.Tensor:
    """The tokens, from the best one on, before which the sum of amounts is below a limit; of equals the lower first.

    The last of these is found digit by digit, by sums over the tokens with the same digit: no row is sorted.

    Args:
        order: int32 [rows, vocabulary], not negative and at most float32's bits of 1.0: the highest is the best.
        amounts: int64 [rows, vocabulary], not negative.
        limits: int64 [rows, 1], at least 1.

    Returns:
        bool [rows, vocabulary].
    """
    above = torch.zeros_like(limits)
    last = torch.zeros_like(limits, dtype=torch.int32)
    for shift in _DIGITS:
        digits = (order >> shift) & (_DIGIT - 1)
        inside = amounts * (order >> (shift + 10) == last)
        sums = amounts.new_zeros(len(order), _DIGIT).scatter_add_(1, digits.long(), inside)
        # Of the tokens whose digit is higher.
        better = above + sums.flip(1).cumsum(1).flip(1) - sums
        digit = (better >= limits).sum(1, keepdim=True).clamp_(max=_DIGIT - 1)
        above = better.gather(1, digit)
        last = (last << 10) | digit.int()
    equal = order == last
    before = above + (amounts * equal).cumsum(1) - amounts
    return (order > last) | (equal & (before < limits))


def tokens_at(uniforms: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The tokens at which the cumulated weights pass a fraction of their sum, int64 [rows, 1].

    Args:
        uniforms: float64 [rows, 1]: the fractions, in [0, 1).
        weights: int64 [rows, vocabulary], not negative; any token if all are 0.
    """
    rows, vocabulary = weights.shape
    blocks = pad(weights, (0, -vocabulary % _BLOCK)).view(rows, -1, _BLOCK)
    sums = blocks.sum(-1)
    steps = sums.cumsum(-1)
    total = steps[:, -1:]
    target = torch.minimum((uniforms * total).long(), total - 1)
    block = (steps <= target).sum(-1, keepdim=True).clamp_(max=blocks.shape[1] - 1)
    left = target - steps.gather(1, block) + sums.gather(1, block)
    within = blocks.gather(1, block[:, :, None].expand(-1, -1, _BLOCK)).squeeze(1).cumsum(-1)
    token = block * _BLOCK + (within <= left).sum(-1, keepdim=True)
    return token.clamp_(max=vocabulary - 1)
