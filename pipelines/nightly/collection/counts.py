"""What became of the rows of an adapter's new data, in numbers."""

from __future__ import annotations

from loramill.types import FrozenModel


class CollectedCounts(FrozenModel):
    """What became of the rows of new data; the numbers add up to the number of rows.

    Attributes:
        train: new examples that are trained on.
        pairs: preference pairs that are trained on.
        held_out: new examples that are held out.
        repeated: equal to another row, or to one that was used before.
        leaked: left out, because they equal or resemble held-out examples.
        trained: of validation files or of held-out values, left out, because they equal or resemble examples that were
            trained on.
        quarantined: not valid.
    """

    train: int = 0
    pairs: int = 0
    held_out: int = 0
    repeated: int = 0
    leaked: int = 0
    trained: int = 0
    quarantined: int = 0

    def describe(self) -> str:
        """The rows that are not used, in words; empty if all are."""
        parts = [
            (self.repeated, "known already"),
            (self.leaked, "equal or similar to held-out examples"),
            (self.trained, "for validation, but trained on before"),
            (self.quarantined, "quarantined"),
        ]
        return ", ".join(f"{count} {what}" for count, what in parts if count)
