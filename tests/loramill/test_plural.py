"""Numbers with nouns, and lists, in messages."""

from __future__ import annotations

from loramill.plural import counted, listed


def test_only_one_is_singular() -> None:
    assert [counted(number, "job") for number in (0, 1, 2, 1000)] == ["0 jobs", "1 job", "2 jobs", "1,000 jobs"]


def test_the_last_part_of_a_list_follows_and() -> None:
    assert [listed(parts) for parts in (["a"], ["a", "b"], ["a", "b", "c"])] == ["a", "a and b", "a, b and c"]
