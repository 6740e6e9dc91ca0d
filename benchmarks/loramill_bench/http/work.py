"""What is asked for: who asks how often for which model, and prompts that no two have in common."""

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

#: Tokens of a prompt and of an answer.
PROMPT, NEW = 64, 64

#: No adapter; stream s asks always for adapter s mod `DISTINCT`; the k-th of `ADAPTERS` 1/k as often as the first.
Mix = Literal["none", "distinct", "zipf"]
DISTINCT, ADAPTERS = 8, 64

_WORDS = 1024
_WORD = re.compile(" [a-z]{3,}")


@dataclass(frozen=True, slots=True)
class Ask:
    """A request for `NEW` tokens after a prompt of `PROMPT`."""

    model: str
    prompt: str


@dataclass(frozen=True, slots=True)
class Stream:
    """Someone who asks one thing after another, each once the answer before it has ended.

    Attributes:
        asks: what.
        begins: seconds after the start of all.
    """

    asks: tuple[Ask, ...]
    begins: float = 0.0


@dataclass(frozen=True)
class Desk:
    """Where streams are drawn; the same draws give the same streams.

    Attributes:
        base: the base's name.
        adapters: their names, the most wanted first.
        tokenizer: the base's.
        seed: of everything random.
    """

    base: str
    adapters: Sequence[str]
    tokenizer: ChatTokenizer
    seed: int

    def closed(self, mix: Mix, streams: int, each: int, draw: object) -> tuple[Stream, ...]:
        """Streams of so many requests each that all begin at once."""
        rng = self._rng(mix, streams, draw)
        return tuple(Stream(tuple(self._ask(rng, mix, stream) for _ in range(each))) for stream in range(streams))

    def arrivals(self, mix: Mix, rate: float, seconds: float, draw: object) -> tuple[Stream, ...]:
        """Single requests that come whatever becomes of those before, `rate` a second in the mean (Poisson)."""
        rng = self._rng(mix, rate, draw)
        streams: list[Stream] = []
        begins = rng.expovariate(rate)
        while begins < seconds:
            streams.append(Stream((self._ask(rng, mix, len(streams)),), begins))
            begins += rng.expovariate(rate)
        return tuple(streams)

    @cached_property
    def words(self) -> list[str]:
        """Words that are one token wherever they stand.

        Raises:
            BaseUnusable: the tokenizer has too few.
        """
        shown = ((token, self.tokenizer.decode([token])) for token in range(self.tokenizer.vocabulary_size))
        words = (word for token, word in shown if _WORD.fullmatch(word) and self.tokenizer.encode_text(word) == [token])
        found = list(islice(words, _WORDS))
        if len(found) < _WORDS:
            raise BaseUnusable(f"The base '{self.base}' has {len(found)} words of one token, too few for prompts.")
        return found

    def _ask(self, rng: random.Random, mix: Mix, stream: int) -> Ask:
        match mix:
            case "none":
                model = self.base
            case "distinct":
                model = self.adapters[stream % DISTINCT]
            case "zipf":
                (model,) = rng.choices(self.adapters, [1 / place for place in range(1, len(self.adapters) + 1)])
        return Ask(model, "".join(rng.choices(self.words, k=PROMPT)))

    def _rng(self, *what: object) -> random.Random:
        return random.Random(f"{self.seed} {what}")
