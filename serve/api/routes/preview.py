"""Previews of training: a file's sizes, and its first example as the base's chat template renders it."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from statistics import median
from typing import Any

from loramill.data.examples import Examples
from loramill.data.tokenizer import ChatTokenizer, EncodedExample
from loramill.types import Learn

#: Characters of one part of the preview.
_SHOWN = 4000


def preview(examples: Examples, tokenizer: ChatTokenizer, learn: Learn) -> dict[str, Any]:
    """Describes valid examples: tokens of each sequence, tokens that the loss is computed on, and the first example.

    Args:
        examples: they passed `check_tokens`.
        tokenizer: the base's.
        learn: which answers of a conversation.
    """
    tokenizer = tokenizer.at(datetime.now(UTC))
    encoded = [tokenizer.example(example, learn) for example in examples.examples]
    sequences = [sequence for each in encoded for sequence in each.sequences]
    lengths = [len(sequence.tokens) for sequence in sequences]
    return {
        "tokens": {"min": min(lengths), "median": round(median(lengths)), "max": max(lengths), "total": sum(lengths)},
        "supervised_tokens": sum(span.stop - span.start for sequence in sequences for span in sequence.spans),
        "preview": parts(encoded[0], tokenizer),
    }


def parts(encoded: EncodedExample, tokenizer: ChatTokenizer) -> list[dict[str, Any]]:
    """The text of an example's first sequence, in parts that the loss is computed on and parts that it isn't."""
    found: list[dict[str, Any]] = []
    start = 0
    for span in encoded.spans:
        for stop, supervised in ((span.start, False), (span.stop, True)):
            if stop > start:
                found.append({"text": _shown(tokenizer, encoded.tokens[start:stop]), "supervised": supervised})
            start = stop
    return found


def _shown(tokenizer: ChatTokenizer, tokens: Sequence[int]) -> str:
    text = tokenizer.rendered(tokens)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]}\u2026{text[-_SHOWN // 2 :]}"
