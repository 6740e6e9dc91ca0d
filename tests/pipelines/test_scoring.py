import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramill.pipelines.scoring import Score, common_subsequence, overall, rouge_l, score, token_f1


@pytest.mark.parametrize(
    ("answer", "reference", "f1"),
    [("a b c", "a b c", 1.0), ("a b", "c d", 0.0), ("a b", "b", 2 / 3), ("a a b", "a b b", 2 / 3), ("", "", 1.0)],
)
def test_token_f1(answer: str, reference: str, f1: float) -> None:
    assert token_f1(answer, reference) == pytest.approx(f1)


@pytest.mark.parametrize(
    ("answer", "reference", "f"),
    [
        # Lin 2004, section 3.1: what ROUGE-L tells apart and bigrams don't
        ("police kill the gunman", "police killed the gunman", 0.75),
        ("the gunman kill police", "police killed the gunman", 0.5),
        ("the gunman police killed", "police killed the gunman", 0.5),
        # rouge_score's own tests
        ("testing", "testing one two", 0.5),
        ("three four", "testing one two", 0.0),
        ("12 3 4 five six", "12 five 3 4 seven", 0.6),
        # its words: lower case, punctuation parts them
        ("The Cricketers, near-by!", "the cricketers near by", 1.0),
        ("snake_case", "snake case", 1.0),
        ("Größe über alles", "größe unter alles", 2 / 3),
        ("", "word", 0.0),
        ("?!", "?!", 1.0),
        ("?!", "!?", 0.0),
    ],
)
def test_rouge_l(answer: str, reference: str, f: float) -> None:
    assert rouge_l(answer, reference) == pytest.approx(f)


def longest_by_definition(one: str, other: str) -> int:
    """The recursive definition of the longest common subsequence."""
    if not one or not other:
        return 0
    if one[0] == other[0]:
        return 1 + longest_by_definition(one[1:], other[1:])
    return max(longest_by_definition(one[1:], other), longest_by_definition(one, other[1:]))


short_words = st.text("abc", max_size=7)


@given(short_words, short_words)
def test_common_subsequence_is_the_longest(one: str, other: str) -> None:
    assert common_subsequence(list(one), list(other)) == longest_by_definition(one, other)


def test_score_ignores_surrounding_white_space_only() -> None:
    assert score([" yes\n", "Yes"], ["yes", "yes"]) == Score(2, 0.5, 0.5, 1.0)


def test_no_answers_score_nothing() -> None:
    assert score([], []) == overall([]) == Score(0, 0.0, 0.0, 0.0)


def test_overall_weighs_by_examples() -> None:
    assert overall([Score(1, 1.0, 1.0, 1.0), Score(3, 0.0, 0.0, 0.2)]) == Score(4, 0.25, 0.25, pytest.approx(0.4))
