# ruff: noqa: RUF001 - other scripts are what is tested
import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramill.pipelines.nightly.text_metrics import (
    Score,
    common_subsequence,
    json_valid,
    overall,
    rouge_l,
    score,
    score_example,
    token_f1,
)


@pytest.mark.parametrize(
    ("answer", "reference", "f1"),
    [("a b c", "a b c", 1.0), ("a b", "c d", 0.0), ("a b", "b", 2 / 3), ("a a b", "a b b", 2 / 3), ("", "", 1.0)],
)
def test_token_f1(answer: str, reference: str, f1: float) -> None:
    assert token_f1(answer, reference) == pytest.approx(f1)


@pytest.mark.parametrize(
    ("answer", "reference", "f"),
    [
        # Lin 2004, section 3.1: what ROUGE-L distinguishes and bigrams do not
        ("police kill the gunman", "police killed the gunman", 0.75),
        ("the gunman kill police", "police killed the gunman", 0.5),
        ("the gunman police killed", "police killed the gunman", 0.5),
        # rouge_score's own tests
        ("testing", "testing one two", 0.5),
        ("three four", "testing one two", 0.0),
        ("12 3 4 five six", "12 five 3 4 seven", 0.6),
        # its words: lower case, split at punctuation
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


#: One wrong word or character in each: what both contain / all of the answer and all of the reference.
IN_MANY_LANGUAGES = [
    # Chinese: 7 of 8 characters; the full stop counts in F1, and isn't a word of ROUGE-L.
    pytest.param("您的包裹明天到。", "您的包裹今天到。", 14 / 16, 12 / 14, id="zh"),
    # Japanese: han, hiragana and katakana with its sound mark, which is half-width in the answer; 9 and 10 characters.
    pytest.param("ｻｰﾊﾞｰは止まる", "サーバーは止まった", 2 * 7 / (8 + 9), 2 * 7 / (8 + 9), id="ja"),
    pytest.param("赤の品は二番倉庫", "赤の品は一番倉庫", 14 / 16, 14 / 16, id="ja digit"),
    # Japanese and English: `API` and `v3.` are words; ROUGE-L splits `v2.1` at its dot.
    pytest.param("APIのv2.1です", "APIのv2.0です", 2 * 4 / 10, 2 * 5 / 12, id="en+ja"),
    pytest.param("Please use 東京駅 today", "Please use 京都駅 today", 2 * 5 / 12, 2 * 5 / 12, id="ja in en"),
    # Korean has spaces between words, to which endings are attached; the answer's syllables are decomposed.
    pytest.param("\u1109\u1165\u110b\u116e\u11af\u110b\u1166 갑니다.", "서울에 옵니다.", 0.5, 0.5, id="ko"),
    # Thai: 5 consonants, 1 with a vowel and a tone mark on it, of which one differs.
    pytest.param("บ้านสวย", "บ้านสอย", 2 * 5 / 12, 2 * 5 / 12, id="th"),
    # Khmer: the subscript's sign goes with the consonant before it; the answer has a zero-width space between words.
    pytest.param("ភ្នំ\u200bពេញ", "ភ្នំពាញ", 2 * 3 / 8, 2 * 3 / 8, id="km"),
    pytest.param("မြန်မာ", "မြန်စာ", 2 * 2 / 6, 2 * 2 / 6, id="my"),
    pytest.param("ສະບາຍດີ", "ສະບາຍໃຈ", 2 * 5 / 13, 2 * 5 / 13, id="lo"),
    # Tibetan: the mark between syllables is a character, not a word.
    pytest.param("བོད་ཡིག", "བོད་སྐད", 2 * 3 / (5 + 5), 2 * 2 / (4 + 4), id="bo"),
    # Javanese and Balinese: a consonant with the signs on it is a character; Yi: a syllable.
    pytest.param("\ua9a7\ua9b1\ua997\ua9ae", "\ua9a7\ua9b1\ua997\ua9a4", 0.75, 0.75, id="jv"),
    pytest.param("\u1b29\u1b2e\u1b36", "\u1b29\u1b32\u1b36", 0.5, 0.5, id="ban"),
    pytest.param("\ua188\ua320\ua259", "\ua188\ua320\ua071", 2 / 3, 2 / 3, id="ii"),
    # Words of these are separated by spaces; a word's vowel signs, points and joiners belong to it.
    pytest.param("मेरा नाम क्या है", "मेरा नाम क्यों है", 0.75, 0.75, id="hi"),
    pytest.param("की", "का", 0.0, 0.0, id="hi vowel sign"),
    pytest.param("أنا أحب القهوة", "أنا أحب الشاي", 2 / 3, 2 / 3, id="ar"),
    pytest.param("\u200fأنا أحب القهوة", "أنا أحب القهوة", 1.0, 1.0, id="ar direction mark"),
    pytest.param("نمی\u200cدانم او", "نمی\u200cخواهم او", 0.5, 0.5, id="fa"),
    pytest.param("אני אוהב קפה", "אני אוהב תה", 2 / 3, 2 / 3, id="he"),
    pytest.param("Заказ придёт завтра", "заказ придет завтра", 1 / 3, 2 / 3, id="ru"),
    pytest.param("Die Gro\u0308\u00dfe pa\u00dft", "Die Größe stimmt", 2 / 3, 2 / 3, id="de"),
    # An emoji is a token of its own, with its skin or its family; to ROUGE-L it is not a word.
    pytest.param("👍🏽👨\u200d👩\u200d👧🇩🇪", "👍🏽👨\u200d👩\u200d👧🇫🇷", 4 / 6, 0.0, id="emoji"),
    pytest.param("Done! 🎉", "Done! 🚀", 0.5, 1.0, id="en emoji"),
]


@pytest.mark.parametrize(("answer", "reference", "f1", "rouge"), IN_MANY_LANGUAGES)
def test_every_language_is_scored_by_its_words_or_characters(
    answer: str, reference: str, f1: float, rouge: float
) -> None:
    assert score([answer], [reference]) == Score(1, float(f1 == 1), pytest.approx(f1), pytest.approx(rouge))
    assert score([reference], [reference]) == Score(1, 1.0, 1.0, 1.0)


def test_full_width_and_invisible_characters_make_no_difference() -> None:
    assert score(["ＡＢＣ－１２３\u200b", "\ufeffe\u0301te\u0301"], ["ABC-123", "été"]) == Score(2, 1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("answer", "reference", "exact", "f1", "rouge"),
    [
        ("Your order #1042 ships today.", "Your order #1042 ships tomorrow.", 0.0, 4 / 5, 4 / 5),
        ("It's café-style: 12% off", "It’s café-style: 12% off", 0.0, 3 / 4, 1.0),
        ("© 2024 Acme", "Acme © 2024", 0.0, 1.0, 0.5),
        ('{"item":"figs","qty":3}', '{"item":"figs","qty":4}', 0.0, 0.0, 0.75),
        ("Yes", "yes", 0.0, 0.0, 1.0),
        ("e-mail a_b", "e-mail a_b", 1.0, 1.0, 1.0),
    ],
)
def test_english_is_scored_as_it_always_was(answer: str, reference: str, exact: float, f1: float, rouge: float) -> None:
    # The values that split() and runs of [^\W_] give.
    assert score([answer], [reference]) == Score(1, exact, pytest.approx(f1), pytest.approx(rouge))


@given(st.text(st.characters(codec="ascii")), st.text(st.characters(codec="ascii")))
def test_ascii_has_the_tokens_that_white_space_and_letters_give(answer: str, reference: str) -> None:
    pattern = re.compile(r"[^\W_]+")
    assert token_f1(answer, reference) == pytest.approx(_f1(answer.split(), reference.split()))
    words = pattern.findall(answer.lower()), pattern.findall(reference.lower())
    assert all(words) or rouge_l(answer, reference) in (0.0, 1.0)
    if all(words):
        assert rouge_l(answer, reference) == pytest.approx(2 * common_subsequence(*words) / sum(map(len, words)))


def _f1(answer: list[str], reference: list[str]) -> float:
    if not answer or not reference:
        return float(answer == reference)
    return 2 * sum((Counter(answer) & Counter(reference)).values()) / (len(answer) + len(reference))


@pytest.mark.parametrize(
    ("answer", "valid"),
    [
        ('{"a": [1, null, true]}', 1.0),
        (' "text"\n', 1.0),
        ("7", 1.0),
        ('{"a": 1', 0.0),
        ('Here it is: {"a": 1}', 0.0),
        ('```json\n{"a": 1}\n```', 0.0),
        ("NaN", 0.0),
        ('{"a": -Infinity}', 0.0),
        ("", 0.0),
        ("[" * 100_000, 0.0),
    ],
)
def test_a_whole_answer_is_json_or_not(answer: str, valid: float) -> None:
    assert json_valid(answer) == valid


def test_only_the_chosen_scores_are_computed() -> None:
    assert score_example("ＡＢ ", "AB", ["exact_match", "json_valid", "loss"]) == {
        "exact_match": 1.0,
        "json_valid": 0.0,
    }
    assert list(score_example("a", "b", ["rouge_l"])) == ["rouge_l"]
