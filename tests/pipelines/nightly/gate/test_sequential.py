from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramill.pipelines.nightly.gate.candidates import GateVerdict, GoldenScore, PairedScores, PairedSlice
from loramill.pipelines.nightly.gate.policy import decide
from loramill.pipelines.nightly.gate.sequential import PendingSlice, decide_early


def scored(name: str, won: int, lost: int, tied: int) -> PairedSlice:
    pairs = [(1.0, 0.0)] * won + [(0.0, 1.0)] * lost + [(1.0, 1.0)] * tied
    examples = [PairedScores(f"{name} {number}", 0.0, *pair) for number, pair in enumerate(pairs)]
    return PairedSlice(name, "old" if name == "before" else "new", tuple(examples))


def left(name: str, count: int) -> PendingSlice:
    return PendingSlice(
        name, "old" if name == "before" else "new", tuple(f"{name} left {each}" for each in range(count))
    )


@pytest.mark.parametrize(
    ("known", "pending", "verdict", "reason"),
    [
        # No gain on the new examples: the old ones are not needed.
        (
            [scored("new", 2, 1, 40)],
            [left("before", 200)],
            GateVerdict.HOLD,
            "with the 200 of 243 examples that were not evaluated counted as won",
        ),
        ([scored("new", 0, 0, 90)], [left("new", 4)], GateVerdict.HOLD, "may be chance: it is better on 4"),
        ([scored("new", 0, 0, 90)], [left("new", 5)], None, ""),
        (
            [scored("new", 0, 40, 0)],
            [left("new", 3)],
            GateVerdict.REJECT,
            "3 of 43 examples that were not evaluated counted as won",
        ),
        (
            [scored("new", 30, 0, 10)],
            [left("new", 9)],
            GateVerdict.PROMOTE,
            "even with the 9 of 49 examples that were not evaluated counted as lost",
        ),
        ([scored("new", 30, 0, 10)], [left("before", 9)], None, ""),
        ([scored("new", 30, 0, 10), scored("before", 0, 0, 99)], [left("before", 1)], GateVerdict.PROMOTE, "as lost"),
        ([scored("new", 30, 0, 10), scored("before", 0, 30, 60)], [left("before", 9)], GateVerdict.REJECT, "as won"),
        ([], [left("new", 9)], None, ""),
        ([scored("new", 9, 0, 1)], [], GateVerdict.PROMOTE, "it gains 0.900"),
    ],
)
def test_evaluation_stops_once_the_rest_cannot_matter(
    known: list[PairedSlice], pending: list[PendingSlice], verdict: GateVerdict | None, reason: str
) -> None:
    decision = decide_early(known, pending)
    assert (decision and decision.verdict) == verdict
    assert decision is None or reason in decision.reason, decision.reason


def test_a_golden_example_that_failed_is_certain_harm() -> None:
    known, pending = [scored("new", 9, 0, 1)], [left("new", 50)]
    failed = decide_early(known, pending, [GoldenScore("g" * 64, 0.0, "no")], ["h" * 64])
    assert (
        failed is not None and failed.verdict is GateVerdict.REJECT and "fails 1 of 2 golden examples" in failed.reason
    )
    assert decide_early(known, (), (), ["h" * 64]) is None


def test_a_first_version_is_decided_early_too() -> None:
    examples = tuple(PairedScores(str(number), 0.0, 1.0) for number in range(30))
    decision = decide_early([PairedSlice("new", "new", examples)], [left("new", 5)])
    assert decision is not None and decision.promote and "first version" in decision.reason


unit = st.sampled_from([0.0, 0.5, 1.0])


@given(
    st.lists(st.tuples(unit, unit, unit), min_size=1, max_size=30),
    st.lists(st.tuples(unit, unit, unit), max_size=10),
    st.integers(1, 5),
)
def test_an_early_decision_is_that_of_all_examples(
    new: list[tuple[float, float, float]], old: list[tuple[float, float, float]], chunk: int
) -> None:
    examples = [
        (name, PairedScores(f"{name} {number}", *row))
        for name, each in (("new", new), ("before", old))
        for number, row in enumerate(each)
    ]

    def slices(part: list[tuple[str, PairedScores]]) -> list[PairedSlice]:
        found = {name: tuple(each for owner, each in part if owner == name) for name, _ in part}
        return [PairedSlice(name, "old" if name == "before" else "new", each) for name, each in found.items()]

    final = decide(slices(examples))
    for done in range(chunk, len(examples) + chunk, chunk):
        pending = [
            PendingSlice(each.name, each.kind, tuple(e.example for e in each.examples))
            for each in slices(examples[done:])
        ]
        decision = decide_early(slices(examples[:done]), pending)
        if decision is not None:
            assert decision.promote == final.promote
            assert decision.verdict is not GateVerdict.REJECT or final.verdict is GateVerdict.REJECT
            return
    raise AssertionError("all examples decide")
