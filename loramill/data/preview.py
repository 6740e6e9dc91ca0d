"""Previews of training: a file's sizes, and its first example as the base's chat template renders it."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from statistics import median
from typing import Any

from loramill.data.encoding import EncodedExample, encode_example
from loramill.data.examples import Examples
from loramill.data.tokenizer import ChatTokenizer
from loramill.types import TrainOn

#: Characters of one part of the preview.
_MAX_PART_CHARACTERS = 4000


def preview_examples(examples: Examples, tokenizer: ChatTokenizer, train_on: TrainOn) -> dict[str, Any]:
    """Describes valid examples: tokens of each sequence, tokens that the loss is computed on, and the first example.

    A preference is shown twice, with each of its answers.

    Args:
        examples: they passed `check_tokens`.
        tokenizer: the base's.
        train_on: which answers of a conversation.
    """
    tokenizer = tokenizer.at_time(datetime.now(UTC))
    sides = [side for example in examples.examples for side in example.sides]
    encoded = [encode_example(tokenizer, side, train_on) for side in sides]
    sequences = [sequence for each in encoded for sequence in each.sequences]
    lengths = [len(sequence.tokens) for sequence in sequences]
    return {
        "tokens": {"min": min(lengths), "median": round(median(lengths)), "max": max(lengths), "total": sum(lengths)},
        "supervised_tokens": sum(span.stop - span.start for sequence in sequences for span in sequence.spans),
        "kind": examples.kind,
        "preview": [
            part for side in encoded[: len(examples.examples[0].sides)] for part in preview_parts(side, tokenizer)
        ],
    }


def preview_parts(encoded: EncodedExample, tokenizer: ChatTokenizer) -> list[dict[str, Any]]:
    """The text of an example's first sequence, in parts that the loss is computed on and parts that it isn't."""
    found: list[dict[str, Any]] = []
    start = 0
    for span in encoded.spans:
        for stop, supervised in ((span.start, False), (span.stop, True)):
            if stop > start:
                found.append({"text": _shortened(tokenizer, encoded.tokens[start:stop]), "supervised": supervised})
            start = stop
    return found


def _shortened(tokenizer: ChatTokenizer, tokens: Sequence[int]) -> str:
    text = tokenizer.decode_with_special_tokens(tokens)
    return (
        text
        if len(text) <= _MAX_PART_CHARACTERS
        else f"{text[: _MAX_PART_CHARACTERS // 2]}\u2026{text[-_MAX_PART_CHARACTERS // 2 :]}"
    )
