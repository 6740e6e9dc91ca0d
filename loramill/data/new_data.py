"""Splits the new examples of an adapter for a nightly run, and decides how many are enough. Pure functions."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from loramill.plural import counted

#: Number of old examples that are trained again with the new ones; they halve forgetting.
REPLAY_EXAMPLES = 64
#: Fraction of the new data that is held out if it has no validation file.
HELD_OUT_FRACTION = 0.1


def held_out_count(examples: int, share: float = HELD_OUT_FRACTION) -> int:
    """Number of new examples that are held out if they have no validation file."""
    return max(1, round(examples * share))


def required_examples(*, validation: bool, replay: int, minimum: int, share: float = HELD_OUT_FRACTION) -> int:
    """The fewest new examples that a nightly run trains on.

    Args:
        validation: whether they have a validation file, so that none is held out.
        replay: number of old examples that are trained again with them.
        minimum: the fewest examples to train on, old and new together.
        share: fraction of the new examples that is held out without a validation file.
    """
    to_train = max(1, minimum - replay)
    examples = to_train
    while not validation and examples - held_out_count(examples, share) < to_train:
        examples += 1
    return examples


def outlook(examples: int, validation: int, *, replay: int, minimum: int, share: float = HELD_OUT_FRACTION) -> str:
    """What the next nightly run does with new examples, or how many are missing, in one or two sentences."""
    needed = required_examples(validation=bool(validation), replay=replay, minimum=minimum, share=share)
    if examples < needed:
        held = "" if validation else f" ({held_out_count(needed, share)} of them held out to evaluate the new version)"
        return (
            f"{counted(examples, 'new example')} so far, and a nightly run needs at least {needed}{held}: "
            f"add {needed - examples} more with `loramill data add`. The data waits until then."
        )
    held_out = validation or held_out_count(examples, share)
    trained = examples if validation else examples - held_out
    old_examples = f" and {counted(replay, 'older one')}" if replay else ""
    evaluation = (
        f"the {counted(held_out, 'validation example')}" if validation else counted(held_out, "held-out example")
    )
    data = f"{counted(trained, 'new example')}{old_examples}"
    return f"The next nightly run trains on {data}, and evaluates the new version on {evaluation}."


def pairs_outlook(pairs: int, *, has_champion: bool) -> str:
    """What nightly runs do with preference pairs that were added, in two sentences.

    Args:
        pairs: their number.
        has_champion: whether the adapter has a version that training can continue.
    """
    wait = "" if has_champion else " They wait until the adapter has examples or a champion."
    return (
        f"{counted(pairs, 'preference pair')}, on which a nightly run trains after new examples, once there are as "
        f"many as feedback.min_pairs of nightly.yaml, by default 20.{wait}"
    )


def sample(rows: Iterable[bytes], count: int, seed: str = "") -> list[bytes]:
    """At most `count` rows, chosen by their content: the same rows and seed give the same sample."""
    return shuffled(rows, seed)[:count]


def shuffled(rows: Iterable[bytes], seed: str = "") -> list[bytes]:
    """Rows in a random-looking order that depends on their content and the seed alone."""
    prefix = hashlib.sha256(seed.encode())

    def key(row: bytes) -> bytes:
        keyed = prefix.copy()
        keyed.update(row)
        return keyed.digest()

    return sorted(rows, key=key)
