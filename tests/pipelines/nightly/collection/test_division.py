"""Rows that are divided by a field of their metadata: the rules, over sequences of nightly runs."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loramill.data.examples import read_row
from loramill.pipelines.nightly.collection.division import Division
from loramill.pipelines.nightly.collection.fingerprint import Fingerprint, dialog
from loramill.pipelines.nightly.collection.policy import Fate
from loramill.pipelines.nightly.collection.relation import Known
from loramill.pipelines.nightly.collection.rows import CheckedRows, NewFile, check_rows
from loramill.pipelines.nightly.collection.sorting import SortedRows, sort_rows
from loramill.pipelines.nightly.definition import SplitDefinition
from loramill.types import ContentSide

from .test_policy import THRESHOLD, edited, sentence, similarity

Metadata = dict[str, str | float | bool]


def line(text: str, **metadata: str | float | bool) -> dict:
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}]
    return {"messages": messages} | ({"metadata": metadata} if metadata else {})


def pair(text: str, **metadata: str | float | bool) -> dict:
    answers = {f"{kind}_output": [{"role": "assistant", "content": kind}] for kind in ("preferred", "non_preferred")}
    return {"input": {"messages": line(text)["messages"][:1]}, "metadata": metadata, **answers}


def checked(train: list[dict], valid: list[dict]) -> CheckedRows:
    files = [
        NewFile(name, b"".join(json.dumps(each).encode() + b"\n" for each in rows), validation)
        for name, rows, validation in (("train", train, False), ("valid", valid, True))
    ]
    found = check_rows(files)
    assert not found.bad
    return found


@dataclass
class NightlyRuns:
    """An adapter over several nightly runs, with what they record, and the rows that they trained on and held out."""

    recorded: dict[str, tuple[ContentSide, Fingerprint]] = field(default_factory=dict)
    released: set[str] = field(default_factory=set)
    trained: list[bytes] = field(default_factory=list)
    held: list[bytes] = field(default_factory=list)

    def run(
        self, train: list[dict], valid: list[dict] | None = None, share: float = 0.3, by: str = "user"
    ) -> SortedRows:
        sides = {key: side for key, (side, _) in self.recorded.items()}
        known = Known(
            [each for _, each in self.recorded.values()],
            list(sides.values()),
            [key not in self.released for key in sides],
        )
        rules = SplitDefinition(by=by, held_out=share)
        found = sort_rows(checked(train, valid or []), known, rules, 1, Division(by, share, sides))
        for side, rows in ((ContentSide.TRAIN, [*found.train, *found.pairs]), (ContentSide.HELD_OUT, found.held)):
            new = [row for row in rows if row.fate is not Fate.REPEATED]
            self.recorded |= {row.fingerprint.digest: (side, row.fingerprint) for row in new}
            groups = {row.group for row in rows if row.group is not None and row.side is side}
            self.recorded |= {key: (side, Fingerprint(key, np.empty(0, np.uint32))) for key in groups}
            self.released -= {row.fingerprint.digest for row in new}
        self.trained += [each.raw for each in (*found.train, *found.pairs)]
        self.held += [each.raw for each in found.held]
        return found

    def release(self) -> None:
        """What was used until now is given to other runs: no version that was trained on it is left."""
        self.released = set(self.recorded)
        self.trained, self.held = [], []


def values(rows: list[bytes], by: str = "user") -> set[str]:
    return {str(metadata[by]) for row in rows if by in (metadata := read_row(row, 1).metadata)}


def assert_nothing_leaked(runs: NightlyRuns) -> None:
    held, trained = ([dialog(read_row(row, 1)) for row in rows] for rows in (runs.held, runs.trained))
    assert not set(held) & set(trained)
    assert all(similarity(one, other) < THRESHOLD for one in set(held) for other in set(trained))


# Sentences, repeated and edited, of some users or of none, so that users share content and near-duplicates.
content = st.tuples(st.integers(0, 8), st.integers(0, 3)).map(
    lambda each: edited(each[0], each[1] * 17) if each[1] else sentence(each[0])
)
metadata = st.fixed_dictionaries({}, optional={"user": st.sampled_from("abcde"), "team": st.sampled_from("xy")})
row = st.tuples(st.sampled_from((line, line, pair)), content, metadata).map(lambda each: each[0](each[1], **each[2]))
example = st.tuples(content, metadata).map(lambda each: line(each[0], **each[1]))
one_run = st.tuples(st.lists(row, max_size=12), st.lists(example, max_size=2), st.sampled_from((0.1, 0.3, 0.5)))


@settings(deadline=None, max_examples=60)
@given(found=st.lists(one_run, min_size=1, max_size=4), released=st.integers(-1, 3))
def test_no_user_is_on_both_sides_over_all_runs(
    found: list[tuple[list[dict], list[dict], float]], released: int
) -> None:
    runs = NightlyRuns()
    for number, (train, valid, share) in enumerate(found):
        if number == released:
            runs.release()
        runs.run(train, valid, share)
        assert not values(runs.trained) & values(runs.held)
        assert_nothing_leaked(runs)


@settings(deadline=None, max_examples=40)
@given(found=st.lists(st.tuples(one_run, st.sampled_from(("user", "team"))), min_size=2, max_size=4))
def test_another_field_leaks_no_held_out_example(
    found: list[tuple[tuple[list[dict], list[dict], float], str]],
) -> None:
    runs = NightlyRuns()
    for (train, valid, share), by in found:
        runs.run(train, valid, share, by)
        assert_nothing_leaked(runs)


@settings(deadline=None, max_examples=40)
@given(first=st.lists(row, max_size=10), second=st.lists(row, max_size=10), order=st.randoms())
def test_the_order_of_rows_changes_nothing(first: list[dict], second: list[dict], order: random.Random) -> None:
    runs, others = NightlyRuns(), NightlyRuns()
    for rows in (first, second):
        runs.run(rows)
        others.run(order.sample(rows, len(rows)))
    assert (set(runs.trained), set(runs.held)) == (set(others.trained), set(others.held))


def users(count: int, rows: int = 3) -> list[dict]:
    return [
        line(sentence(rows * user + number), user=f"user-{user}") for user in range(count) for number in range(rows)
    ]


def test_the_share_is_one_of_values_and_does_not_depend_on_other_rows() -> None:
    runs = NightlyRuns()
    runs.run(users(200, rows=2), share=0.2)
    held = values(runs.held)
    assert 0.15 < len(held) / 200 < 0.25 and len(runs.held) == 2 * len(held)
    single = Division("user", 0.2)
    for user in range(0, 200, 7):
        key = single.key({"user": f"user-{user}"})
        assert key is not None and (single.side(key) is ContentSide.HELD_OUT) == (f"user-{user}" in held)


def test_rows_of_a_held_out_user_are_held_out_in_later_runs() -> None:
    runs = NightlyRuns()
    runs.run(users(20))
    held, trained = values(runs.held), values(runs.trained)
    assert len(held) >= 2 and len(trained) >= 2
    rows = [line(sentence(1000 + number), user=user) for number, user in enumerate((*sorted(held), *sorted(trained)))]
    counts = runs.run(rows, share=0.01).counts  # as another share would decide
    assert (counts.held_out, counts.train) == (len(held), len(trained))


def test_one_of_few_users_is_held_out() -> None:
    runs = NightlyRuns()
    runs.run(users(3), share=0.001)
    assert len(values(runs.held)) == 1 and len(runs.held) == 3
    alone = NightlyRuns()
    alone.run(users(1), share=0.001)
    assert not alone.held and len(alone.trained) == 3


def test_rows_without_the_field_are_split_by_their_content() -> None:
    runs = NightlyRuns()
    plain = [line(sentence(1000 + number)) for number in range(40)]
    empty = [line(sentence(2000 + number), user="") for number in range(10)]
    counts = runs.run([*users(3), *plain, *empty], share=0.1).counts
    none = [row for row in runs.held if not read_row(row, 1).metadata.get("user")]
    assert len(none) == 5, "a tenth of 50"
    assert counts.train + counts.held_out == 59


def test_near_duplicates_of_two_users_do_not_join_them() -> None:
    """The one to train on is left out, and the others of its user are trained on."""
    sides = NightlyRuns()
    sides.run(users(20))
    held, trained = min(values(sides.held)), min(values(sides.trained))
    runs = NightlyRuns()
    found = runs.run(
        [
            line(sentence(1), user=held),
            line(edited(1, 20), user=trained),
            *(line(sentence(number), user=trained) for number in range(10, 20)),
        ]
    )
    assert (found.counts.held_out, found.counts.leaked, found.counts.train) == (1, 1, 10)
    later = runs.run([line(edited(12, 20), user=held), line(sentence(30), user=held), line(sentence(31), user=trained)])
    assert (later.counts.trained, later.counts.held_out, later.counts.train) == (1, 1, 1)


def test_a_value_of_a_validation_file_is_held_out_from_then_on() -> None:
    runs = NightlyRuns()
    first = runs.run(
        [line(sentence(number), user="ann") for number in range(10)] + users(3), [line(sentence(40), user="ann")], 0.001
    )
    assert first.counts.held_out == 11 and values(runs.held) == {"ann"}
    second = runs.run([line(sentence(50), user="ann"), line(sentence(51), user="user-0")], share=0.001)
    assert (second.counts.held_out, second.counts.train) == (1, 1)
    third = runs.run([line(sentence(60), user="user-0")], [line(sentence(61), user="user-0")], 0.001)
    assert (third.counts.train, third.counts.trained) == (1, 1), "user-0 was trained on before"


def test_a_pair_of_a_held_out_user_is_not_trained_on() -> None:
    runs = NightlyRuns()
    runs.run(users(20))
    held = min(values(runs.held))
    found = runs.run([pair(sentence(900), user=held), pair(sentence(901), user=min(values(runs.trained)))])
    assert (found.counts.pairs, found.counts.held_out) == (1, 1)
    assert Counter(each.pair is None for each in found.held) == {False: 1}


def test_what_a_repeated_pair_teaches_is_recorded() -> None:
    runs = NightlyRuns()
    found = runs.run([pair(sentence(1)), pair(sentence(1))])
    assert [each.fate for each in found.pairs] == [Fate.TRAIN]
    assert [side for side, _ in runs.recorded.values()] == [ContentSide.TRAIN]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [(7, "7", True), (7.0, 7, True), (True, "true", True), (7.5, 7, False), ("Ann", "ann", False), (1, True, False)],
)
def test_values_are_equal_whatever_a_table_makes_of_them(one: object, other: object, same: bool) -> None:
    division = Division("user", 0.1)
    assert (division.key({"user": one}) == division.key({"user": other})) is same  # type: ignore[dict-item]
    assert division.key({"user": one}) != Division("team", 0.1).key({"team": one})  # type: ignore[dict-item]
    assert division.key({}) is None and division.key({"user": ""}) is None
