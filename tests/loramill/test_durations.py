"""Durations as text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramill.durations import format_duration, parse_duration, rounded_duration


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("15m", 900), ("12h", 43_200), ("30d", 2_592_000), ("0s", 0)]
)
def test_a_duration_is_a_whole_number_and_a_unit(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "5", "5 h", "-1h", "1.5h", "1w", "h", "1h30m", "9999999999s"])
def test_another_form_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="90s, 15m, 12h or 30d"):
        parse_duration(text)


@given(st.integers(0, 10**8))
def test_a_formatted_duration_is_read_again(seconds: int) -> None:
    assert parse_duration(format_duration(seconds)) == seconds


def test_a_duration_is_written_in_its_largest_unit() -> None:
    assert [format_duration(each) for each in (0, 59, 60, 5400, 7200, 86_400)] == ["0s", "59s", "1m", "90m", "2h", "1d"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-3, "0 s"),
        (0, "0 s"),
        (59.4, "59 s"),
        (60, "1 min"),
        (3599, "1 h 00 min"),
        (7500, "2 h 05 min"),
        (2e5, "2 d 7 h"),
    ],
)
def test_durations_are_written_in_everyday_units(seconds: float, text: str) -> None:
    assert rounded_duration(seconds) == text
