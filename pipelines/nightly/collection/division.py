"""Which side the rows of a value of their metadata are on: all rows of one user are held out, or none. Pure functions.

- A value keeps its side over all runs, also if the share changes.
- A new value is held out if a hash of field and value is below the share, so that the choice depends on nothing else.
- A new value of a validation file is held out.
- If nothing else would be held out, the new value with the smallest hash is, unless it is the only value.

A side belongs to a field and a value: with another field, all values are new.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from loramill.types import ContentSide

Metadata = Mapping[str, str | float | bool]


@dataclass(frozen=True, slots=True)
class Division:
    """The sides of the values of a field.

    Attributes:
        by: the field.
        share: the share of new values to hold out, above 0 and at most 0.5.
        sides: the sides of values that were decided, by `key`.
    """

    by: str
    share: float
    sides: Mapping[str, ContentSide] = field(default_factory=dict)

    def key(self, metadata: Metadata) -> str | None:
        """A hash of the field and the value that a row has; None: it has none, and its content decides its side."""
        value = metadata.get(self.by)
        if isinstance(value, bool):
            value = str(value).lower()
        elif isinstance(value, float) and value.is_integer():
            value = int(value)  # tables write whole numbers so
        text = "" if value is None else str(value)
        return hashlib.sha256(json.dumps([self.by, text]).encode()).hexdigest() if text else None

    def side(self, key: str) -> ContentSide:
        """The side of the rows of a value."""
        return self.sides.get(key) or self._by_hash(key)

    def holds_out(self, metadata: Metadata) -> bool:
        """Whether a row's value is held out."""
        key = self.key(metadata)
        return key is not None and self.side(key) is ContentSide.HELD_OUT

    def decide(self, training: Collection[str], validation: Collection[str], *, others_held_out: bool) -> Division:
        """Decides the sides of the values of new rows.

        Args:
            training: keys of the rows of training files.
            validation: keys of the rows of validation files.
            others_held_out: whether rows without a value will be held out.
        """
        keys = {*training, *validation}
        new = keys - self.sides.keys()
        decided = {each: ContentSide.HELD_OUT if each in validation else self._by_hash(each) for each in new}
        sides = {**self.sides, **decided}
        none_held = not others_held_out and all(sides[each] is ContentSide.TRAIN for each in keys)
        if none_held and new and len(keys) > 1:
            sides[min(new)] = ContentSide.HELD_OUT
        return replace(self, sides=sides)

    def _by_hash(self, key: str) -> ContentSide:
        return ContentSide.HELD_OUT if int(key[:16], 16) / 2**64 < self.share else ContentSide.TRAIN
