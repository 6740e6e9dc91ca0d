"""Samples tokens from rows of logits on the host; for logits on a GPU see `device_sampler`.

Each row is processed alone, in numpy: its token depends on its logits and its request only, and a row of 50,000 logits
stays in a core's cache from the first pass to the last.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from loramill.errors import LoramillError
from loramill.serve.engine.types import TokenMask
from loramill.serve.sampling_params import SamplingParams

Row = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

#: Below this temperature the most probable token is selected: dividing by less exceeds float32's range.
GREEDY_BELOW = 1e-5

#: A row is summed in blocks of this many logits: adding them up one by one costs more than computing them.
_BLOCK = 256

_UINT64_MAX = 2**64 - 1
#: SplitMix64's stride: 2^64 divided by the golden ratio, made odd.
STRIDE = 0x9E3779B97F4A7C15


@dataclass(frozen=True, slots=True)
class Shifts:
    """Changes of one row's logits.

    Attributes:
        seen: Tokens that the repetition penalty applies to.
        shifted: Tokens with an amount: a bias, or the presence and frequency penalties.
        amounts: What is added to their logits, float64.
    """

    seen: npt.NDArray[np.intp]
    shifted: npt.NDArray[np.intp]
    amounts: Doubles


class Sampler:
    """Samples the tokens of one answer from its randomness, its mask and the tokens so far.

    Two samplers with the same parameters (including a seed), prompt, index, mask and accepted tokens sample the same
    tokens, so an answer may be dropped and computed again at any time.

    Attributes:
        params: The sampling parameters.
        mask: The tokens that may come next; None: all.
        key: 64 bits; the random bits of token i are SplitMix64's at `key + i * STRIDE`.
        sampled_tokens: Number of tokens accepted so far.
    """

    __slots__ = (
        "__weakref__",
        "_amounts",
        "_index_of",
        "_last_token",
        "_penalized",
        "_seen",
        "_shifted",
        "key",
        "mask",
        "params",
        "sampled_tokens",
    )

    def __init__(
        self, params: SamplingParams, prompt: Sequence[int], index: int = 0, mask: TokenMask | None = None
    ) -> None:
        """
        Args:
            params: Validated; the tokens of `logit_bias` are within the vocabulary.
            prompt: Its tokens; only the repetition penalty reads them.
            index: Which of the prompt's n answers this is; it is added to the seed.
            mask: The answer's own; None: all tokens are allowed.
        """
        seed = secrets.randbits(64) if params.seed is None else params.seed
        self.params = params
        self.sampled_tokens = 0
        self.key = _mix(seed + index)
        self.mask = mask
        self._seen = np.unique(np.array(prompt if params.repetition_penalty != 1.0 else (), np.intp))
        bias = dict(params.logit_bias)
        # Tokens with an amount to add to their logits: a bias, or the presence and frequency penalties.
        self._shifted = np.array([*bias], np.intp)
        self._amounts = np.array([*bias.values()], np.float64)
        self._index_of = {token: position for position, token in enumerate(bias)}
        self._penalized: set[int] = set()
        self._last_token = 0

    @property
    def is_greedy(self) -> bool:
        """Whether the next token is the most probable one by unchanged logits."""
        return self.params.temperature < GREEDY_BELOW and not self._changes and self.mask is None

    @property
    def finished(self) -> bool:
        """Whether the mask allows no further token."""
        return self.mask is not None and self.mask.finished

    @property
    def error(self) -> LoramillError | None:
        """The mask's error, if it has one."""
        return None if self.mask is None else self.mask.error

    def accept(self, token: int) -> None:
        """Appends a token to the answer."""
        s = self.params
        self.sampled_tokens += 1
        self._last_token = token
        if self.mask is not None:
            self.mask.accept(token)
        if s.repetition_penalty != 1.0:
            self._seen = np.append(self._seen, token)
        if s.presence_penalty or s.frequency_penalty:
            self._penalize(token)

    def sample(self, logits: Row) -> int | None:
        """Samples the next token from logits [vocabulary], which are not modified; their maximum is finite.

        Returns:
            The token; None if the mask allows only tokens whose logits are -inf.
        """
        row = logits
        if self.mask is not None:
            allowed = np.unpackbits(self.mask.allowed_bits(), count=len(logits), bitorder="little").view(np.bool_)
            row = np.where(allowed, logits, np.float32(-np.inf))
            if not row.max() > -np.inf:
                return None
        if self._changes:
            changed = self._change(row)
            # If all tokens are banned, the bans are dropped; the mask is not.
            row = changed if changed.max() > -np.inf else row
        if self.params.temperature < GREEDY_BELOW:
            return int(row.argmax())
        # SplitMix64 at the token's position in the answer.
        return _draw(row, self.params, _mix(self.key + self.sampled_tokens * STRIDE))

    @property
    def _changes(self) -> bool:
        return bool(len(self._seen) or len(self._shifted) or self.sampled_tokens < self.params.min_tokens)

    @property
    def has_shifts(self) -> bool:
        """Whether penalties or a bias change logits at any position."""
        s = self.params
        return bool(s.logit_bias or s.presence_penalty or s.frequency_penalty) or s.repetition_penalty != 1.0

    def shifts_since(self, sampled_tokens: int | None) -> Shifts:
        """What has changed since the answer had `sampled_tokens` tokens, and possibly more; None: everything."""
        s, last = self.params, self._last_token
        if sampled_tokens is None or sampled_tokens < self.sampled_tokens - 1:
            return Shifts(self._seen, self._shifted, self._amounts)
        new = slice(0, self.sampled_tokens - sampled_tokens)
        seen = np.array([last] if s.repetition_penalty != 1.0 else [], np.intp)[new]
        shifted = np.array([last] if s.presence_penalty or s.frequency_penalty else [], np.intp)[new]
        return Shifts(seen, shifted, self._amounts[[self._index_of[token] for token in shifted]])

    @property
    def banned_tokens(self) -> tuple[int, ...]:
        """Stop tokens that may not come next because the answer has fewer than `min_tokens` tokens."""
        return self.params.stop_ids if self.sampled_tokens < self.params.min_tokens else ()

    def _penalize(self, token: int) -> None:
        index = self._index_of.setdefault(token, len(self._shifted))
        if index == len(self._shifted):
            self._shifted = np.append(self._shifted, token)
            self._amounts = np.append(self._amounts, 0.0)
        s = self.params
        self._amounts[index] -= s.frequency_penalty + (0.0 if token in self._penalized else s.presence_penalty)
        self._penalized.add(token)

    def _change(self, logits: Row) -> Row:
        s, row = self.params, logits.copy()
        # A token that is in `_seen` twice is set to the same value twice.
        seen = row[self._seen]
        row[self._seen] = np.where(seen > 0, seen / s.repetition_penalty, seen * s.repetition_penalty)
        row[self._shifted] += self._amounts
        if banned := self.banned_tokens:
            row[[token for token in banned if token < len(row)]] = -np.inf
        return row


def sample(logits: torch.Tensor, samplers: Sequence[Sampler]) -> list[int | None]:
    """Samples a token for each row; the samplers do not accept it yet.

    The order is: the mask; the repetition, presence and frequency penalties, the bias, the ban on stop tokens before
    `min_tokens`; then temperature, top_k, top_p of what top_k left, and min_p. This is transformers' order. vLLM has
    bias and ban before the penalties and min_p before top_k, which differs for a token with both a bias and a
    repetition penalty, and in what top_p is a fraction of. If all tokens that the mask allows are banned, none is.

    Args:
        logits: float32 [rows, vocabulary], on the CPU.
        samplers: One per row.

    Returns:
        A token per row; None where the highest allowed logit is not finite.
    """
    values: npt.NDArray[np.float32] = logits.numpy(force=True)
    tokens = values.argmax(-1)
    finite = np.isfinite(values[np.arange(len(values)), tokens])
    # A logit of float32's minimum means -inf, and may become it.
    with np.errstate(over="ignore"):
        return [
            None if not valid else int(token) if sampler.is_greedy else sampler.sample(row)
            for sampler, row, token, valid in zip(samplers, values, tokens, finite, strict=True)
        ]


def _draw(row: Row, s: SamplingParams, bits: int) -> int:
    """Samples a token from a row of logits, whose maximum is finite, with 64 random bits."""
    if not 0 < s.top_k < len(row):
        return _draw_weighted(_weights(row, s.temperature), s, bits)
    # Without the tokens that are not among the top_k, the rest is cheap.
    tokens = np.flatnonzero(row >= np.partition(row, -s.top_k)[-s.top_k])
    return int(tokens[_draw_weighted(_weights(row[tokens], s.temperature), s, bits)])


def _draw_weighted(weights: Row, s: SamplingParams, bits: int) -> int:
    """Samples a token from what top_k, top_p and min_p leave of a distribution, without sorting it.

    A token is drawn from all of them. If top_k, top_p or min_p exclude it, they also exclude every token after it in
    the order of the weights: all of these are removed and another token is drawn, which halves the weights on average.
    (FlashInfer does this on GPUs: Ye et al. 2025, "Sorting-Free GPU Kernels for LLM Sampling".)

    Args:
        weights: [vocabulary], probabilities times a constant such that the highest is 1.
        bits: 64 random bits.
    """
    limit = s.top_k or len(weights)
    share = np.inf
    if s.top_p < 1.0:
        share = s.top_p * (weights if limit >= len(weights) else np.partition(weights, -limit)[-limit:]).sum()
    while True:
        # The upper 53 bits, as a double in [0, 1).
        token = _token_at((bits >> 11) * 2.0**-53, weights)
        if limit >= len(weights) and share == np.inf and s.min_p <= 0.0:
            return token
        before = weights > weights[token]
        # Of equal weights the lower token comes first.
        before[:token] |= weights[:token] == weights[token]
        left = weights * before
        rank = np.count_nonzero(before)
        # A token is kept while those before it have less than the share; the first always is.
        if not rank or (rank < limit and left.sum() < share and weights[token] >= s.min_p):
            return token
        weights, bits = left, _mix(bits + STRIDE)


def _token_at(random: float, weights: Row) -> int:
    """The token at which the cumulated weights reach the fraction `random` of their sum."""
    starts = np.arange(0, len(weights), _BLOCK)
    sums = np.add.reduceat(weights, starts).astype(np.float64)
    steps = sums.cumsum()
    block = _passed(steps, random)
    rest = (random * steps[-1] - (steps[block] - sums[block])) / sums[block]
    start = int(starts[block])
    return start + _passed(weights[start : start + _BLOCK].cumsum(dtype=np.float64), rest)


def _weights(row: Row, temperature: float) -> Row:
    """The probabilities times a constant such that the highest is 1."""
    weights: Row = row - row.max()
    weights /= np.float32(temperature)
    np.exp(weights, out=weights)
    return weights


def _passed(steps: Doubles, random: float) -> int:
    """The index at which cumulated weights pass the fraction `random` of their sum; never that of a zero weight."""
    return int(min(steps.searchsorted(random * steps[-1], "right"), steps.searchsorted(steps[-1])))


def _mix(bits: int) -> int:
    """SplitMix64's output function (Steele et al. 2014, "Fast splittable pseudorandom number generators")."""
    bits &= _UINT64_MAX
    bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & _UINT64_MAX
    bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & _UINT64_MAX
    return bits ^ (bits >> 31)
