"""Finds stop strings in a stream of text, without releasing a part of one."""

from __future__ import annotations


class StopScanner:
    """Passes text through until one of `stops` occurs; the stop string itself is never returned."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Returns the text that can be released now, and whether a stop string was reached."""
        held = self._held + text
        found = [at for stop in self._stops if (at := held.find(stop)) >= 0]
        if found:
            self._held = ""
            return held[: min(found)], True
        keep = partial_match_length(held, self._stops)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep], False

    def finish(self) -> str:
        """Returns the text that was held back, when the answer ends without a stop string."""
        held, self._held = self._held, ""
        return held


def partial_match_length(text: str, strings: tuple[str, ...]) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of one of the strings."""
    lengths = range(min(len(text), max(map(len, strings), default=1) - 1), 0, -1)
    return next((n for n in lengths if any(each.startswith(text[-n:]) for each in strings)), 0)
