"""Scores of generated answers against references, in any script.

Texts are compared in Unicode's form NFKC, without invisible format characters. Scripts that are written without spaces
between words are compared by characters, as SQuAD's scores are in Chinese and Japanese (CMRC 2018, DRCD, JSQuAD):
split at white space, a whole sentence would be one word, which is right or wrong as a whole. In mixed text each run of
such a script is split, and the rest stays words.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import regex

#: Scripts without spaces between words: Chinese, Japanese and Yi, Tibetan, and those of South East Asia whose lines
#: Unicode's annex 14 breaks by dictionary (class SA) or at any syllable (rule LB28a). The prolonged sound mark of kana
#: is of no script.
_UNSPACED = (
    r"[\p{Han}\p{Hiragana}\p{Katakana}\u30FC\p{Bopomofo}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}"
    r"\p{New_Tai_Lue}\p{Tai_Le}\p{Tai_Tham}\p{Tai_Viet}\p{Yi}\p{Javanese}\p{Balinese}]"
)
#: A character of theirs with the vowel signs and tone marks that are written on it.
_CHARACTER = rf"{_UNSPACED}\p{{M}}*"
#: An emoji or a flag starts here; signs such as (c), which are text without a selector, are not emoji.
_EMOJI = r"(?=[\p{Emoji_Presentation}\p{Regional_Indicator}]|\p{Emoji}\uFE0F)"
#: What token F1 counts: such a character, an emoji, or other text between white space, with its punctuation.
_TOKEN = regex.compile(rf"{_CHARACTER}|{_EMOJI}\X|(?:(?!{_UNSPACED}|{_EMOJI})\S)+")
#: What ROUGE-L counts: such a character, if it is a letter or digit, or a run of others. A joiner doesn't end a word.
_WORD = regex.compile(
    rf"(?=[\p{{L}}\p{{N}}]){_CHARACTER}|"
    rf"(?:(?!{_UNSPACED})[\p{{L}}\p{{N}}\p{{M}}](?:[\u200C\u200D](?=[\p{{L}}\p{{N}}]))?)+"
)
#: Format characters that no reader sees: soft hyphen, zero-width space, direction marks, word joiner, byte order mark.
_INVISIBLE = dict.fromkeys([0x00AD, 0x061C, 0x200B, 0x200E, 0x200F, *range(0x202A, 0x202F), 0x2060, 0xFEFF])
_INVISIBLE |= dict.fromkeys(range(0x2066, 0x206A))


@dataclass(frozen=True, slots=True)
class Score:
    """Means over `examples` answers, each 0 to 1.

    Attributes:
        exact_match: the share that is exactly right.
        token_f1: SQuAD's, on words, or characters of scripts without spaces.
        rouge_l: how much of the order of the reference's words, or such characters, is kept.
    """

    examples: int
    exact_match: float
    token_f1: float
    rouge_l: float


def score(answers: Sequence[str], references: Sequence[str]) -> Score:
    """Scores answers against their references; surrounding white space doesn't count."""
    pairs = [(normalized(answer), normalized(reference)) for answer, reference in zip(answers, references, strict=True)]
    if not pairs:
        return Score(0, 0.0, 0.0, 0.0)

    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(pairs)

    return Score(
        examples=len(pairs),
        exact_match=mean([answer == reference for answer, reference in pairs]),
        token_f1=mean([token_f1(*pair) for pair in pairs]),
        rouge_l=mean([rouge_l(*pair) for pair in pairs]),
    )


def normalized(text: str) -> str:
    """The text in NFKC, without invisible format characters and surrounding white space.

    NFKC makes full-width and half-width forms, composed and decomposed letters one.
    """
    return unicodedata.normalize("NFKC", text.translate(_INVISIBLE)).strip()


def token_f1(answer: str, reference: str) -> float:
    """Harmonic mean of precision and recall of the answer's words, counted with their multiplicity.

    Words are separated by white space; in scripts without spaces, each character is one.
    """
    given, wanted = _TOKEN.findall(normalized(answer)), _TOKEN.findall(normalized(reference))
    if not given or not wanted:
        return float(given == wanted)
    common = sum((Counter(given) & Counter(wanted)).values())
    return 2 * common / (len(given) + len(wanted))


def rouge_l(answer: str, reference: str) -> float:
    """ROUGE-L: the F-measure (beta 1) of the longest common subsequence of words (Lin 2004, section 3.1).

    Words are runs of letters and digits in lower case, as the usual `rouge_score` has them, but of any script, with
    their vowel signs; in scripts without spaces, each letter or digit is one.
    """
    answer, reference = normalized(answer), normalized(reference)
    given, wanted = _WORD.findall(answer.lower()), _WORD.findall(reference.lower())
    if not given or not wanted:
        return float(answer == reference)
    return 2 * common_subsequence(given, wanted) / (len(given) + len(wanted))


def common_subsequence(one: Sequence[str], other: Sequence[str]) -> int:
    """Length of the longest sequence that is left of both by crossing words out."""
    lengths = [0] * (len(other) + 1)
    for word in one:
        diagonal = 0
        for place, candidate in enumerate(other, start=1):
            above = lengths[place]
            lengths[place] = diagonal + 1 if word == candidate else max(above, lengths[place - 1])
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
