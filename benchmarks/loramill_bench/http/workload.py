"""The workload: streams of requests with random prompts, and the mix of models that they request."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Literal

from loramill.data.tokenizer import ChatTokenizer
from loramill.errors import BaseUnusable

#: Number of tokens of a prompt and of an answer.
PROMPT_TOKENS, OUTPUT_TOKENS = 64, 64

#: none: the base; distinct: stream s always requests adapter s mod `DISTINCT`; zipf: the k-th of `ADAPTERS` adapters is
#: requested 1/k as often as the first.
Mix = Literal["none", "distinct", "zipf"]
DISTINCT, ADAPTERS = 8, 64

_WORDS = 1024
_WORD = re.compile(" [a-z]{3,}")


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    """A request for `OUTPUT_TOKENS` tokens after a prompt of `PROMPT_TOKENS`."""

    model: str
    prompt: str


@dataclass(frozen=True, slots=True)
class Stream:
    """Requests that a client sends one after another, each after the end of the previous answer.

    Attributes:
        requests: The requests.
        start_seconds: Time of the first request, in seconds since the start of the run.
    """

    requests: tuple[CompletionRequest, ...]
    start_seconds: float = 0.0


@dataclass(frozen=True)
class Workload:
    """Generates streams; equal arguments give equal streams.

    Attributes:
        base: Name of the base.
        adapters: Names of the adapters, the most requested first.
        tokenizer: Tokenizer of the base.
        seed: Seed of all random choices.
    """

    base: str
    adapters: Sequence[str]
    tokenizer: ChatTokenizer
    seed: int

    def closed_loop(self, mix: Mix, streams: int, requests_per_stream: int, label: object) -> tuple[Stream, ...]:
        """Streams that all start at once (closed loop); streams of different `label`s have different prompts."""
        rng = self._rng(mix, streams, label)
        return tuple(
            Stream(tuple(self._request(rng, mix, stream) for _ in range(requests_per_stream)))
            for stream in range(streams)
        )

    def poisson(self, mix: Mix, rate: float, seconds: float, label: object) -> tuple[Stream, ...]:
        """Streams of one request each, with Poisson arrivals (open loop) of `rate` requests per second."""
        rng = self._rng(mix, rate, label)
        streams: list[Stream] = []
        start = rng.expovariate(rate)
        while start < seconds:
            streams.append(Stream((self._request(rng, mix, len(streams)),), start))
            start += rng.expovariate(rate)
        return tuple(streams)

    @cached_property
    def words(self) -> list[str]:
        """Words that are a single token in any context.

        Raises:
            BaseUnusable: The tokenizer has too few such words.
        """
        shown = ((token, self.tokenizer.decode([token])) for token in range(self.tokenizer.vocabulary_size))
        words = (word for token, word in shown if _WORD.fullmatch(word) and self.tokenizer.encode_text(word) == [token])
        found = list(islice(words, _WORDS))
        if len(found) < _WORDS:
            raise BaseUnusable(
                f"The base '{self.base}' has only {len(found)} words of one token; prompts need {_WORDS}."
            )
        return found

    def _request(self, rng: random.Random, mix: Mix, stream: int) -> CompletionRequest:
        match mix:
            case "none":
                model = self.base
            case "distinct":
                model = self.adapters[stream % DISTINCT]
            case "zipf":
                (model,) = rng.choices(self.adapters, [1 / rank for rank in range(1, len(self.adapters) + 1)])
        return CompletionRequest(model, "".join(rng.choices(self.words, k=PROMPT_TOKENS)))

    def _rng(self, *key: object) -> random.Random:
        return random.Random(f"{self.seed} {key}")
