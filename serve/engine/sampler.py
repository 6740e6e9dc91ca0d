"""From rows of logits to tokens.

A row is worked on alone, in numpy: its token depends on its logits and its request only, and a row of 50,000 logits
stays in a core's cache from the first pass to the last. Of a GPU's logits only those rows come over of which more than
the likeliest token is asked.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from loramill.errors import LoramillError
from loramill.serve.engine.types import TokenLogprobs, TokenMask
from loramill.serve.sampling_params import SamplingParams

Row = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

#: Below this temperature the likeliest token is taken: dividing by less leaves float32's range.
GREEDY_BELOW = 1e-5

#: A row's sums are taken over so many logits at a time: adding them up one by one costs more than making them.
_BLOCK = 256

_WORD = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 divided by the golden ratio, odd: SplitMix64's stride


class Sampler:
    """What one answer's choices depend on beside its logits: its randomness, its mask, and the tokens before.

    Two choosers with the same sampling (its seed given), prompt, index, mask and taken tokens choose alike, so an
    answer may be dropped and computed again at any time.
    """

    __slots__ = ("_amounts", "_key", "_mask", "_places", "_seen", "_shifted", "_taken", "params", "sampled_tokens")

    def __init__(
        self, params: SamplingParams, prompt: Sequence[int], index: int = 0, mask: TokenMask | None = None
    ) -> None:
        """
        Args:
            sampling: as admitted; the tokens of `logit_bias` are within the vocabulary.
            prompt: its tokens; only the repetition penalty reads them.
            index: which of the n answers to the prompt; it is added to the seed.
            mask: the answer's own; None: all tokens may come.
        """
        seed = secrets.randbits(64) if params.seed is None else params.seed
        self.params = params
        self.sampled_tokens = 0
        self._key = _mix(seed + index)
        self._mask = mask
        self._seen = np.unique(np.array(prompt if params.repetition_penalty != 1.0 else (), np.intp))
        bias = dict(params.logit_bias)
        # Tokens whose logits get an amount added: those with a bias, and those that presence and frequency penalize.
        self._shifted = np.array([*bias], np.intp)
        self._amounts = np.array([*bias.values()], np.float64)
        self._places = {token: place for place, token in enumerate(bias)}
        self._taken: set[int] = set()

    @property
    def is_greedy(self) -> bool:
        """Whether the next token is the likeliest one, with nothing to change in the logits."""
        return self.params.temperature < GREEDY_BELOW and not self._changes and self._mask is None

    @property
    def finished(self) -> bool:
        """Whether the mask lets nothing follow."""
        return self._mask is not None and self._mask.finished

    @property
    def error(self) -> LoramillError | None:
        """Why the mask can't tell what may follow."""
        return None if self._mask is None else self._mask.error

    def accept(self, token: int) -> None:
        """Notes that `token` is the answer's next."""
        s = self.params
        self.sampled_tokens += 1
        if self._mask is not None:
            self._mask.accept(token)
        if s.repetition_penalty != 1.0:
            self._seen = np.append(self._seen, token)
        if s.presence_penalty or s.frequency_penalty:
            self._penalize(token)

    def sample(self, logits: Row) -> int | None:
        """The next token by logits [vocabulary], which aren't written to; their maximum is finite.

        None if the mask allows only tokens that the model says can't come.
        """
        row = logits
        if self._mask is not None:
            row = np.where(self._mask.allowed(), logits, np.float32(-np.inf))
            if not row.max() > -np.inf:
                return None
        if self._changes:
            changed = self._change(row)
            # Where everything is banned, nothing is; but no ban opens what the mask shuts.
            row = changed if changed.max() > -np.inf else row
        if self.params.temperature < GREEDY_BELOW:
            return int(row.argmax())
        # SplitMix64 at the token's place in the answer.
        return _draw(row, self.params, _mix(self._key + self.sampled_tokens * _GOLDEN))

    @property
    def _changes(self) -> bool:
        return bool(len(self._seen) or len(self._shifted) or self.sampled_tokens < self.params.min_tokens)

    def _penalize(self, token: int) -> None:
        place = self._places.setdefault(token, len(self._shifted))
        if place == len(self._shifted):
            self._shifted = np.append(self._shifted, token)
            self._amounts = np.append(self._amounts, 0.0)
        s = self.params
        self._amounts[place] -= s.frequency_penalty + (0.0 if token in self._taken else s.presence_penalty)
        self._taken.add(token)

    def _change(self, logits: Row) -> Row:
        s, row = self.params, logits.copy()
        # A token that is in `_seen` twice gets the same value twice.
        seen = row[self._seen]
        row[self._seen] = np.where(seen > 0, seen / s.repetition_penalty, seen * s.repetition_penalty)
        row[self._shifted] += self._amounts
        if self.sampled_tokens < s.min_tokens:
            row[[token for token in s.stop_ids if token < len(row)]] = -np.inf
        return row


def sample(logits: torch.Tensor, samplers: Sequence[Sampler]) -> list[int | None]:
    """A token for each row, None where the highest logit that may be chosen isn't finite; nothing is taken yet.

    In this order: the mask; the repetition penalty, presence and frequency, the bias, the stop tokens banned before
    `min_tokens`; then temperature, top_k, top_p of what top_k left, and min_p. That is transformers' order; vLLM has
    bias and stop tokens before the penalties and min_p before top_k, which differs for a token with both a bias and a
    repetition penalty, and in what top_p is a share of. If all tokens that the mask allows are banned, it is as if none
    were.

    Args:
        logits: [rows, vocabulary] float32, on any device.
        rows: whose they are.
    """
    likeliest = _argmax_by_numpy(logits) if logits.device.type == "cpu" else argmax_by_torch(logits)
    # A logit of float32's minimum is as good as -inf, and becomes it.
    with np.errstate(over="ignore"):
        return [
            first if first is None or chooser.is_greedy else chooser.sample(row.numpy(force=True))
            for chooser, row, first in zip(samplers, logits, likeliest, strict=True)
        ]


def argmax_by_torch(logits: torch.Tensor) -> list[int | None]:
    """Each row's likeliest token, the first of equals; None where its logit isn't finite, as where one is NaN.

    Nothing but that leaves the logits' device.
    """
    tokens = logits.argmax(-1, keepdim=True)
    found = torch.cat([tokens, logits.gather(1, tokens).isfinite()], 1).tolist()
    return [token if sound else None for token, sound in found]


def _argmax_by_numpy(logits: torch.Tensor) -> list[int | None]:
    """The same on the CPU, where numpy is many times as fast."""
    values: npt.NDArray[np.float32] = logits.numpy(force=True)
    tokens = values.argmax(-1)
    sound = np.isfinite(values[np.arange(len(values)), tokens])
    return [int(token) if good else None for token, good in zip(tokens, sound, strict=True)]


def token_logprobs(logits: torch.Tensor, tokens: Sequence[int], tops: Sequence[int]) -> list[TokenLogprobs]:
    """Each row's log probability of its token and of its `tops` likeliest, best first.

    Args:
        logits: [rows, vocabulary] float32, as the decoder gave them.
        tokens: one a row.
        tops: how many likeliest, one a row; at most the vocabulary is given.
    """
    logprobs = logits.log_softmax(-1)
    chosen = logprobs[torch.arange(len(tokens)), torch.tensor(tokens, dtype=torch.long)].tolist()
    entries = []
    for row, token, logprob, top in zip(logprobs, tokens, chosen, tops, strict=True):
        # Row by row: which of equals comes first may depend on how many are asked for.
        values, ids = row.topk(min(top, len(row)))
        entries.append(TokenLogprobs(token, logprob, tuple(zip(ids.tolist(), values.tolist(), strict=True))))
    return entries


def _draw(row: Row, s: SamplingParams, word: int) -> int:
    """The token that 64 random bits choose from a row of logits, of which the highest is finite."""
    if not 0 < s.top_k < len(row):
        return _draw_weighted(_weights(row, s.temperature), s, word)
    # With the rest gone, which is none of the top_k, nothing costs much.
    tokens = np.flatnonzero(row >= np.partition(row, -s.top_k)[-s.top_k])
    return int(tokens[_draw_weighted(_weights(row[tokens], s.temperature), s, word)])


def _draw_weighted(weights: Row, s: SamplingParams, word: int) -> int:
    """A token of what top_k, top_p and min_p leave of a distribution, without sorting it; the highest weight is 1.

    A token is drawn from all. If it isn't one of those left, neither is any after it in the order of their weights: it
    and they go, and another is drawn, which halves the weights on average. (FlashInfer does so on GPUs: Ye et al.
    2025, "Sorting-Free GPU Kernels for LLM Sampling".)

    Args:
        weights: [vocabulary], probabilities times some number.
        word: 64 random bits.
    """
    limit = s.top_k or len(weights)
    share = np.inf
    if s.top_p < 1.0:
        share = s.top_p * (weights if limit >= len(weights) else np.partition(weights, -limit)[-limit:]).sum()
    while True:
        # The upper 53 bits, as a double in [0, 1).
        token = _token_at((word >> 11) * 2.0**-53, weights)
        if limit >= len(weights) and share == np.inf and s.min_p <= 0.0:
            return token
        before = weights > weights[token]
        # Of equal weights the lower token comes first.
        before[:token] |= weights[:token] == weights[token]
        left = weights * before
        rank = np.count_nonzero(before)
        # A token is kept while those before it don't hold the share yet, and the first always is.
        if not rank or (rank < limit and left.sum() < share and weights[token] >= s.min_p):
            return token
        weights, word = left, _mix(word + _GOLDEN)


def _token_at(random: float, weights: Row) -> int:
    """The token whose part of the weights laid end to end holds the share `random` of their length."""
    starts = np.arange(0, len(weights), _BLOCK)
    sums = np.add.reduceat(weights, starts).astype(np.float64)
    steps = sums.cumsum()
    block = _passed(steps, random)
    rest = (random * steps[-1] - (steps[block] - sums[block])) / sums[block]
    start = int(starts[block])
    return start + _passed(weights[start : start + _BLOCK].cumsum(dtype=np.float64), rest)


def _weights(row: Row, temperature: float) -> Row:
    """The probabilities times some number, the highest being 1."""
    weights: Row = row - row.max()
    weights /= np.float32(temperature)
    np.exp(weights, out=weights)
    return weights


def _passed(steps: Doubles, random: float) -> int:
    """Where cumulated weights pass the share `random` of their sum: never at a weight of zero."""
    return int(min(steps.searchsorted(random * steps[-1], "right"), steps.searchsorted(steps[-1])))


def _mix(word: int) -> int:
    """SplitMix64's output function (Steele et al. 2014, "Fast splittable pseudorandom number generators")."""
    word &= _WORD
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _WORD
    return word ^ (word >> 31)
