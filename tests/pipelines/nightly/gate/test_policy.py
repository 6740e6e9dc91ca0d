from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramill.pipelines.nightly.definition.promotion import GateDefinition
from loramill.pipelines.nightly.gate.candidates import (
    GateDecision,
    GateVerdict,
    GoldenScore,
    PairedScores,
    PairedSlice,
    SliceKind,
)
from loramill.pipelines.nightly.gate.policy import decide

PROMOTE, HOLD, REJECT = GateVerdict.PROMOTE, GateVerdict.HOLD, GateVerdict.REJECT
ORDER = [REJECT, HOLD, PROMOTE]


def part(
    kind: SliceKind,
    won: int = 0,
    lost: int = 0,
    tied: int = 0,
    *,
    name: str = "",
    base: float = 0.0,
    tie: float = 1.0,
    previous: float | None = None,
) -> PairedSlice:
    """A slice with examples that only the challenger, only the champion, or both of them answer right."""
    scores = [(1.0, 0.0)] * won + [(0.0, 1.0)] * lost + [(tie, tie)] * tied
    name = name or kind
    return PairedSlice(
        name,
        kind,
        tuple(
            PairedScores(f"{name} {number}", base, challenger, champion, previous)
            for number, (challenger, champion) in enumerate(scores)
        ),
    )


def first(right: int, wrong: int, base: float = 0.0) -> PairedSlice:
    """A slice without a champion."""
    scores = [1.0] * right + [0.0] * wrong
    return PairedSlice("new", "new", tuple(PairedScores(str(number), base, each) for number, each in enumerate(scores)))


@pytest.mark.parametrize(
    ("slices", "verdict", "reason"),
    [
        ([], HOLD, "no held-out examples"),
        ([part("new", 9, tied=1)], PROMOTE, "it gains 0.900 over the champion on 10 new examples (95% interval +0."),
        ([part("new", 5), part("old", tied=5)], PROMOTE, "on 5 old ones it scores the same"),
        ([part("new", 4)], HOLD, "better on 4 and worse on 0 of 4 new examples (p = 0.062, at most 0.05 is accepted)"),
        ([part("new", 4)], HOLD, "at least 5 held-out examples are needed"),
        ([part("new", 1)], HOLD, "1 new example (p = 0.5"),
        ([part("new", tied=20)], HOLD, "it scores the same as the champion on 20 new examples"),
        ([part("new", 3, 3, 20)], HOLD, "scores the same as the champion on 26 new examples, better on 3 and worse"),
        ([part("new", 6, 2, 40)], HOLD, "its gain of 0.083 over the champion may be chance"),
        ([part("new", 18, 6, 100)], PROMOTE, "it gains 0.097"),
        ([part("new", 1, 2, 40)], HOLD, "it loses 0.023 against the champion on 43 new examples"),
        ([part("new", 0, 9, 1)], REJECT, "it loses 0.900 on the slice 'new', worse on 9 and better on 0"),
        ([part("new", 9), part("old", 0, 1, 31)], PROMOTE, "on 32 old ones it loses 0.031"),
        ([part("new", 9), part("old", 0, 2, 30)], HOLD, "it loses 0.062 on 32 old examples; at most 0.050 is allowed"),
        ([part("new", 9), part("old", 0, 1, 9)], HOLD, "it loses 0.100 on 10 old examples"),
        ([part("new", 9), part("old", 0, 6, 4)], REJECT, "it loses 0.600 on the slice 'old'"),
        ([part("new", 9), part("old", 8, 12, 180)], HOLD, "it may lose up to 0.0"),
        ([part("new", 9), part("old", 4, 6, 390)], PROMOTE, "on 400 old ones it loses 0.005"),
        ([part("new", 9), part("old", tied=10, previous=1.0)], PROMOTE, "it gains"),
        ([part("new", 9, previous=0.0), part("old", tied=10, tie=0.9, previous=1.0)], HOLD, "before the champion"),
        ([part("new", 9, base=1.0)], HOLD, "does not beat the base: both score the same on 9 held-out examples"),
        ([part("new", 9, tied=9, tie=0.0, base=1.0)], REJECT, "does not beat the base: it loses 0.500"),
        ([first(9, 1)], PROMOTE, "first version, and it gains 0.900 over the base on 10 held-out examples"),
        ([first(4, 0)], HOLD, "its gain of 1.000 over the base may be chance"),
        ([first(0, 9)], HOLD, "does not beat the base"),
        ([first(1, 9, base=1.0)], REJECT, "does not beat the base: it loses 0.900"),
        ([part("old", 9)], HOLD, "no new held-out examples"),
    ],
)
def test_decisions(slices: list[PairedSlice], verdict: GateVerdict, reason: str) -> None:
    decision = decide(slices)
    assert (decision.verdict, reason in decision.reason) == (verdict, True), decision.reason


def test_every_golden_example_must_be_right() -> None:
    slices = [part("new", 9)]
    assert decide(slices, [GoldenScore("a" * 64, 1.0)]).promote
    failed = decide(slices, [GoldenScore("a" * 64, 1.0), GoldenScore("b" * 64, 0.4, "It is " + "so " * 40)])
    assert failed.verdict is REJECT
    assert failed.reason == "it fails 1 of 2 golden examples; on bbbbbbbbbbbb it scores 0.400; 100% must be right"
    half = GateDefinition(min_golden=0.5)
    assert decide(slices, [GoldenScore("a" * 64, 1.0), GoldenScore("b" * 64, 0.4)], half).promote


def test_a_gain_below_the_minimum_is_held() -> None:
    decision = decide([part("new", 6, tied=900)], policy=GateDefinition(min_gain=0.01))
    assert decision.verdict is HOLD
    assert decision.reason == "it gains only 0.007 over the champion; at least 0.010 is required"
    assert decide([part("new", 6, tied=900)]).promote


def test_one_bad_slice_of_many_holds_and_a_worse_one_rejects() -> None:
    good = [part("old", tied=40, name=f"before: {number}") for number in range(4)]
    new = part("new", 12, tied=8)

    def with_lost(lost: int) -> GateDecision:
        return decide([new, *good, part("old", 0, lost, 40 - lost, name="before: French")])

    assert [with_lost(lost).verdict for lost in (2, 6, 8)] == [PROMOTE, HOLD, REJECT]
    assert "the slice 'before: French', worse on 6 and better on 0 of 40 examples" in with_lost(6).reason


def test_the_evidence_has_the_numbers_of_each_slice() -> None:
    decision = decide([part("new", 9, tied=1), part("old", tied=8)])
    new, old, base = decision.evidence
    assert (new.name, new.examples, new.gain, new.wins, new.losses) == ("new", 10, 0.9, 9, 0)
    assert new.low <= new.gain <= new.high and new.p_better == 2**-9 and new.p_worse == 1.0
    assert (old.name, old.gain, old.p_better) == ("old", 0.0, 1.0)
    assert (base.against, base.examples) == ("base", 18)
    assert GateDecision.model_validate(decision.model_dump(mode="json")) == decision


scores = st.sampled_from([0.0, 0.25, 1 / 3, 0.5, 2 / 3, 1.0])


@st.composite
def slices_of(draw: st.DrawFn) -> list[PairedSlice]:
    """Up to four slices of up to twelve examples, some of which are in two slices."""
    quadruple = st.tuples(scores, scores, scores, st.none() | scores)
    found = []
    with_previous = draw(st.booleans())
    for number in range(draw(st.integers(1, 4))):
        rows = draw(st.lists(quadruple, min_size=1, max_size=12))
        examples = tuple(
            PairedScores(f"{number} {index}", base, own, champion, (previous or 0.0) if with_previous else None)
            for index, (base, own, champion, previous) in enumerate(rows)
        )
        found.append(PairedSlice(str(number), draw(st.sampled_from(["old", "new"])), examples))
    return found


@given(slices_of(), st.lists(scores, max_size=2), st.data())
def test_a_higher_score_never_makes_the_decision_worse(
    slices: list[PairedSlice], golden: Sequence[float], data: st.DataObject
) -> None:
    before = decide(slices, [GoldenScore(str(each), each) for each in golden])
    chosen = data.draw(st.integers(0, len(slices) - 1))
    index = data.draw(st.integers(0, len(slices[chosen].examples) - 1))
    examples = list(slices[chosen].examples)
    old = examples[index]
    better = data.draw(st.floats(old.challenger, 1.0))
    examples[index] = PairedScores(old.example, old.base, better, old.champion, old.previous)
    slices[chosen] = PairedSlice(slices[chosen].name, slices[chosen].kind, tuple(examples))
    after = decide(slices, [GoldenScore(str(each), max(each, better)) for each in golden])
    assert ORDER.index(after.verdict) >= ORDER.index(before.verdict), (before.reason, after.reason)


@given(slices_of(), st.randoms(use_true_random=False))
def test_the_order_of_the_examples_does_not_matter(slices: list[PairedSlice], order: random.Random) -> None:
    again = [
        PairedSlice(each.name, each.kind, tuple(order.sample(each.examples, len(each.examples)))) for each in slices
    ]
    assert decide(again) == decide(slices)


@given(st.lists(st.tuples(scores, scores), min_size=1, max_size=30))
def test_symmetric_data_never_promotes(pairs: list[tuple[float, float]]) -> None:
    both = [*pairs, *((champion, challenger) for challenger, champion in pairs)]
    examples = tuple(PairedScores(str(number), 0.0, *each) for number, each in enumerate(both))
    assert decide([PairedSlice("new", "new", examples)]).verdict is HOLD


@given(slices_of())
def test_a_promoted_challenger_is_better_on_new_and_base(slices: list[PairedSlice]) -> None:
    decision = decide(slices)
    if decision.promote:
        new = [each for slice_ in slices if slice_.kind == "new" for each in slice_.examples]
        old = [each for slice_ in slices if slice_.kind == "old" for each in slice_.examples]
        assert sum(each.challenger - (each.champion or 0.0) for each in new) >= -1e-9
        assert sum(each.challenger - (each.champion or 0.0) for each in old) >= -0.05 * len(old) - 1e-9
        assert sum(each.challenger - each.base for each in (*new, *old)) > 0
