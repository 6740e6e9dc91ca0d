import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramill.pipelines.nightly.gate import SliceScores, Thresholds, decide
from loramill.pipelines.nightly.scoring import Score, overall

RULES = Thresholds(min_gain=0.01, max_drop=0.05)


def part(name: str, base: float, champion: float | None, challenger: float, examples: int = 100) -> SliceScores:
    def made(value: float) -> Score:
        return Score(examples, value, value, value)

    return SliceScores(name, made(base), None if champion is None else made(champion), made(challenger))


@pytest.mark.parametrize(
    ("slices", "promote", "reason"),
    [
        ([part("new", 0.0, 0.5, 0.9), part("before", 0.0, 0.9, 0.9)], True, "gains 0.200"),
        ([part("new", 0.0, 0.5, 0.9), part("before", 0.0, 0.9, 0.8)], False, "loses 0.100 on the slice 'before'"),
        ([part("new", 0.0, 0.9, 0.905)], False, "gains only 0.005 over the champion; at least +0.010 is required"),
        ([part("new", 0.0, 0.9, 0.7)], False, "loses 0.200"),
        ([part("new", 0.8, 0.2, 0.5)], False, "does not beat the base"),
        ([part("new", 0.1, None, 0.9)], True, "first version"),
        ([part("new", 0.9, None, 0.9)], False, "does not beat the base"),
        ([], False, "no held-out examples"),
    ],
)
def test_decisions(slices: list[SliceScores], promote: bool, reason: str) -> None:
    decision = decide(slices, RULES)
    assert decision.promote is promote
    assert reason in decision.reason


shares = st.floats(0, 1)


@given(st.lists(st.tuples(shares, shares, shares, st.integers(1, 500)), min_size=1, max_size=4))
def test_a_promoted_challenger_is_better_overall_and_worse_nowhere(rows: list[tuple[float, float, float, int]]) -> None:
    slices = [part(str(i), b, c, d, n) for i, (b, c, d, n) in enumerate(rows)]
    if decide(slices, RULES).promote:
        challenger = overall([s.challenger for s in slices]).token_f1
        assert challenger > overall([s.base for s in slices]).token_f1
        assert challenger - overall([s.champion for s in slices if s.champion]).token_f1 >= RULES.min_gain - 1e-9
        assert all(s.champion and s.champion.token_f1 - s.challenger.token_f1 <= RULES.max_drop for s in slices)
