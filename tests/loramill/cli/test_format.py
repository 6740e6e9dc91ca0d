"""Times as commands print them."""

from __future__ import annotations

import time

import pytest

from loramill.cli.format import time_ago


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-5, "just now"),
        (0.4, "just now"),
        (5, "5 s ago"),
        (200, "3 min ago"),
        (7200, "2 h ago"),
        (86400 * 3, "3 d ago"),
    ],
)
def test_times_are_written_in_everyday_units(seconds: float, text: str) -> None:
    assert time_ago(1e9 - seconds, now=1e9) == text


def test_times_long_ago_are_days() -> None:
    assert time_ago(time.time() - 90 * 86400).count("-") == 2
