"""Stop strings: finds the first one in a stream of text and never lets a part of it out."""

from __future__ import annotations


class StopScanner:
    """Passes text through until one of `stops` appears; the stop string itself is never returned."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Returns the text that may be shown now, and whether a stop string was reached."""
        held = self._held + text
        found = [at for stop in self._stops if (at := held.find(stop)) >= 0]
        if found:
            self._held = ""
            return held[: min(found)], True
        keep = partial_match_length(held, self._stops)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep], False

    def finish(self) -> str:
        """Returns what was held back, when the answer ends without a stop string."""
        held, self._held = self._held, ""
        return held


def partial_match_length(text: str, strings: tuple[str, ...]) -> int:
    """Length of the longest end of `text` that one of the strings sought could begin with, and isn't whole."""
    lengths = range(min(len(text), max(map(len, strings), default=1) - 1), 0, -1)
    return next((n for n in lengths if any(each.startswith(text[-n:]) for each in strings)), 0)
