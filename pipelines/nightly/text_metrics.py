"""Scores of generated answers against references, in any script.

Texts are compared in Unicode's form NFKC, without invisible format characters. Scripts without spaces between words are
compared by characters, as SQuAD's scores in Chinese and Japanese (CMRC 2018, DRCD, JSQuAD): split at white space, a
whole sentence would be one word. In mixed text, each run of such a script is split, and the rest is words.
"""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import regex

#: Scripts without spaces between words: Chinese, Japanese and Yi, Tibetan, and those of South East Asia whose lines
#: Unicode's annex 14 breaks by dictionary (class SA) or at any syllable (rule LB28a). The prolonged sound mark of kana
#: has no script.
_UNSPACED = (
    r"[\p{Han}\p{Hiragana}\p{Katakana}\u30FC\p{Bopomofo}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}"
    r"\p{New_Tai_Lue}\p{Tai_Le}\p{Tai_Tham}\p{Tai_Viet}\p{Yi}\p{Javanese}\p{Balinese}]"
)
#: A character of these scripts with its vowel signs and tone marks.
_CHARACTER = rf"{_UNSPACED}\p{{M}}*"
#: An emoji or a flag starts here; signs such as (c), which are text without a selector, are not emoji.
_EMOJI = r"(?=[\p{Emoji_Presentation}\p{Regional_Indicator}]|\p{Emoji}\uFE0F)"
#: A word of token F1: such a character, an emoji, or other text between white space, with its punctuation.
_TOKEN = regex.compile(rf"{_CHARACTER}|{_EMOJI}\X|(?:(?!{_UNSPACED}|{_EMOJI})\S)+")
#: A word of ROUGE-L: such a character, if it is a letter or digit, or a run of others. A joiner does not end a word.
_WORD = regex.compile(
    rf"(?=[\p{{L}}\p{{N}}]){_CHARACTER}|"
    rf"(?:(?!{_UNSPACED})[\p{{L}}\p{{N}}\p{{M}}](?:[\u200C\u200D](?=[\p{{L}}\p{{N}}]))?)+"
)
#: Invisible format characters: soft hyphen, zero-width space, direction marks, word joiner, byte order mark.
_INVISIBLE = dict.fromkeys([0x00AD, 0x061C, 0x200B, 0x200E, 0x200F, *range(0x202A, 0x202F), 0x2060, 0xFEFF])
_INVISIBLE |= dict.fromkeys(range(0x2066, 0x206A))


@dataclass(frozen=True, slots=True)
class Score:
    """Means over `examples` answers, each 0 to 1.

    Attributes:
        exact_match: the fraction of answers that equal their references.
        token_f1: SQuAD's, on words, or characters of scripts without spaces.
        rouge_l: F-measure of the longest common subsequence of words, or characters of scripts without spaces.
    """

    examples: int
    exact_match: float
    token_f1: float
    rouge_l: float


def score(answers: Sequence[str], references: Sequence[str]) -> Score:
    """Scores answers against their references; surrounding white space is ignored."""
    found = [score_example(*pair, _OF_SCORE) for pair in zip(answers, references, strict=True)]
    means = {metric: sum(each[metric] for each in found) / max(1, len(found)) for metric in _OF_SCORE}
    return Score(len(found), **means)


def score_example(answer: str, reference: str, metrics: Collection[str]) -> dict[str, float]:
    """The scores of one answer by those metrics that answer and reference determine; other metrics are left out.

    Surrounding white space is ignored.
    """
    return {metric: scored(answer, reference) for metric, scored in TEXT_METRICS.items() if metric in metrics}


def exact_match(answer: str, reference: str) -> float:
    """1 if the answer equals the reference."""
    return float(normalized(answer) == normalized(reference))


def json_valid(answer: str, reference: str = "") -> float:
    """1 if the whole answer is JSON (RFC 8259, without NaN and infinities), whatever the reference."""
    try:
        json.loads(answer, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return 0.0
    return 1.0


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def normalized(text: str) -> str:
    """The text in NFKC, without invisible format characters and surrounding white space.

    NFKC unifies full-width and half-width forms, and composed and decomposed letters.
    """
    return unicodedata.normalize("NFKC", text.translate(_INVISIBLE)).strip()


def token_f1(answer: str, reference: str) -> float:
    """Harmonic mean of precision and recall of the answer's words, with multiplicity.

    Words are separated by white space; in scripts without spaces, each character is a word.
    """
    answer_words, reference_words = _TOKEN.findall(normalized(answer)), _TOKEN.findall(normalized(reference))
    if not answer_words or not reference_words:
        return float(answer_words == reference_words)
    common = sum((Counter(answer_words) & Counter(reference_words)).values())
    return 2 * common / (len(answer_words) + len(reference_words))


def rouge_l(answer: str, reference: str) -> float:
    """ROUGE-L: the F-measure (beta 1) of the longest common subsequence of words (Lin 2004, section 3.1).

    Words are runs of letters and digits in lower case, as in `rouge_score`, but of any script, with their vowel signs;
    in scripts without spaces, each letter or digit is a word.
    """
    answer, reference = normalized(answer), normalized(reference)
    answer_words, reference_words = _WORD.findall(answer.lower()), _WORD.findall(reference.lower())
    if not answer_words or not reference_words:
        return float(answer == reference)
    return 2 * common_subsequence(answer_words, reference_words) / (len(answer_words) + len(reference_words))


def common_subsequence(one: Sequence[str], other: Sequence[str]) -> int:
    """Length of the longest sequence that is a subsequence of both."""
    lengths = [0] * (len(other) + 1)
    for word in one:
        diagonal = 0
        for position, candidate in enumerate(other, start=1):
            above = lengths[position]
            lengths[position] = diagonal + 1 if word == candidate else max(above, lengths[position - 1])
            diagonal = above
    return lengths[-1]


def overall(scores: Sequence[Score]) -> Score:
    """The score on all slices together: means weighted by examples."""
    total = sum(part.examples for part in scores)
    if not total:
        return Score(0, 0.0, 0.0, 0.0)

    def mean(name: str) -> float:
        weighted: list[float] = [getattr(part, name) * part.examples for part in scores]
        return sum(weighted) / total

    return Score(total, mean("exact_match"), mean("token_f1"), mean("rouge_l"))


#: Metrics of an answer and its reference, each 0 to 1.
TEXT_METRICS: Mapping[str, Callable[[str, str], float]] = {
    "exact_match": exact_match,
    "token_f1": token_f1,
    "rouge_l": rouge_l,
    "json_valid": json_valid,
}
_OF_SCORE = ("exact_match", "token_f1", "rouge_l")
