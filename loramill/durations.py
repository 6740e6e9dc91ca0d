"""Durations as text: a whole number and a unit, such as 90s, 15m, 12h or 30d; or rounded, to be read by people."""

from __future__ import annotations

import re

_UNIT_SECONDS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
#: What to write, for messages.
DURATION_EXAMPLES = "90s, 15m, 12h or 30d"


def parse_duration(text: str) -> float:
    """Returns the seconds of a duration.

    Raises:
        ValueError: the text has another form.
    """
    found = re.fullmatch(r"(\d{1,9})([smhd])", text)
    if found is None:
        raise ValueError(f"give a duration such as {DURATION_EXAMPLES}")
    return float(int(found[1]) * _UNIT_SECONDS[found[2]])


def format_duration(seconds: float) -> str:
    """Returns the text that `parse_duration` reads, in the largest unit that divides it: 5400 is "90m"."""
    whole = round(seconds)
    unit = next(unit for unit, each in _UNIT_SECONDS.items() if whole % each == 0 and (whole or unit == "s"))
    return f"{whole // _UNIT_SECONDS[unit]}{unit}"


def rounded_duration(seconds: float) -> str:
    """Returns a rounded duration for people: "40 s", "3 min", "2 h 05 min", "3 d 4 h"."""
    minutes = round(max(0.0, seconds) / 60)
    if seconds < 60:
        return f"{max(0.0, seconds):.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    hours = minutes // 60
    return f"{hours} h {minutes % 60:02} min" if hours < 24 else f"{hours // 24} d {hours % 24} h"
