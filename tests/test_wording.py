"""Plain words: texts and identifiers contain none of the phrases and names that are listed here.

Every entry of `PHRASES` has its reason, its replacement, and a sentence that must match. `make lint` runs `typos` for
spelling, and this test for meaning.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("loramill", "kernels", "jobs", "serve", "pipelines", "benchmarks", "examples")
#: Their string literals are data as often as texts.
DATA = ("tests",)


@dataclass(frozen=True)
class Phrase:
    """A banned phrase: a regular expression, why, what to write instead, and a sentence that contains it."""

    pattern: str
    reason: str
    instead: str
    example: str

    def found(self, text: str) -> list[str]:
        """Where the phrase occurs in a text."""
        return [match.group() for match in re.finditer(rf"(?i)\b(?:{self.pattern})\b", text)]


ARCHAIC = "archaic"
PERSON = "things do not speak"
METAPHOR = "a homely noun for a technical concept"
DISTRIBUTIVE = "'a' for 'per'"

PHRASES = (
    Phrase("nobody", ARCHAIC, "no one, or the passive", "Nobody reads it."),
    Phrase("whoever", ARCHAIC, "anyone who, or the passive", "It waits for whoever comes."),
    Phrase("learnt", "British, and tokens do not learn", "supervised, or trained", "the learnt tokens"),
    Phrase("beside", "reads as 'next to' in space", "next to, in addition to, or with", "measured beside vLLM"),
    Phrase("mend(s|ed|ing)?", ARCHAIC, "fix", "how to mend it"),
    Phrase("worthless", METAPHOR, "revoked", "makes a key worthless"),
    Phrase("books", METAPHOR, "state, counts, or usage", "The books don't add up."),
    Phrase("the record", METAPHOR, "the registry, or the database", "It is in the record."),
    Phrase("(the|a) night('s)?|nights", METAPHOR, "nightly run", "after the night"),
    Phrase("the house('s)?", METAPHOR, "the project, or the package", "The house has rooms."),
    Phrase("company", METAPHOR, "batch", "alone and in any company"),
    Phrase("(tells?|told)(?! apart| me about)", PERSON, "reports, returns, states, or passes", "the load tells"),
    Phrase("says?( that| so)|isn't said|is said|unsaid", PERSON, "states, or sets", "the spec says so"),
    Phrase("said( of)?", PERSON, "given, or specified", "what is said of a job"),
    Phrase("foretells?|foretold", ARCHAIC, "estimates", "what sizing foretells"),
    Phrase("hangs? on", ARCHAIC, "depends on", "It must not hang on the order."),
    Phrase("goes on|go on", "a phrasal verb with three meanings", "continues, or resumes", "the job goes on"),
    Phrase("so many|so much", "a number has a name", "N, or the number of", "for so many seconds"),
    Phrase(
        r"(?<!there )(is|are) no (?!longer|more|one|such)[a-z]+",
        "a negated noun",
        "is not a",
        "'tenant' is no text",
    ),
    Phrase(
        "an? [a-z]+ an? (token|sequence|step|second|minute|row|rank|layer|replica|process|gateway|adapter|line|file)",
        DISTRIBUTIVE,
        "one … per …",
        "a token a sequence",
    ),
    Phrase(
        "(tokens|examples|requests|bytes|seconds|steps|nats|rows) an? (token|sequence|step|second|minute|row|line)",
        DISTRIBUTIVE,
        "… per …",
        "nats a token",
    ),
)
#: Most texts contain no phrase: one search instead of one per phrase.
ANY = re.compile(rf"(?i)\b(?:{'|'.join(phrase.pattern for phrase in PHRASES)})\b")

#: Parts of identifiers that another word replaced.
NAMES = {
    "books": "usage or state",
    "learnt": "supervised",
    "asked": "requested or pending",
    "told": "reported or passed",
    "said": "options",
    "unsaid": "default",
    "mend": "fix",
    "mends": "fixes",
    "keeper": "reconciler",
    "nights": "nightly_runs",
    "nobody": "none",
    "here": "gateway",
    "night": "nightly",
    "tuned": "adapted",
    "remembered": "cached",
    "rooms": "packages",
    "floors": "layers",
}


def sources(folders: tuple[str, ...] = PACKAGES) -> list[Path]:
    """Python files of some folders."""
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    # Migrations never change, and this file has the phrases themselves.
    return [path for path in found if path.parent.name != "versions" and path != Path(__file__)]


def docstrings(tree: ast.Module) -> dict[int, ast.Constant]:
    """The docstrings of a module, by the identity of their nodes."""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, owners) and node.body and isinstance(node.body[0], ast.Expr):
            value = node.body[0].value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                found[id(value)] = value
    return found


def messages(source: str) -> Iterator[tuple[int, str]]:
    """Texts of a module that users may read: string literals of several words, and the literal parts of f-strings."""
    tree = ast.parse(source)
    documented = docstrings(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documented:
            yield node.lineno, node.value


def comments(source: str) -> Iterator[tuple[int, str]]:
    """Comments and docstrings of a module; comments that follow each other are one text."""
    for node in docstrings(ast.parse(source)).values():
        yield node.lineno, node.value
    block, last = [], -1
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            if block and token.start[0] != last + 1:
                yield last, " ".join(block)
                block = []
            block.append(token.string.lstrip("#: "))
            last = token.start[0]
    if block:
        yield last, " ".join(block)


def prose(markdown: str) -> str:
    """A page without its code."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", markdown, flags=re.M | re.S))


def problems(path: Path, texts: Iterator[tuple[int, str]]) -> list[str]:
    """A line for each banned phrase of a file's texts."""
    name = path.relative_to(ROOT).as_posix()
    return [
        f"{name}:{line}: '{match}' ({phrase.reason}): write {phrase.instead}"
        for line, text in texts
        if ANY.search(plain := " ".join(text.split()))
        for phrase in PHRASES
        for match in phrase.found(plain)
    ]


def names(source: str) -> Iterator[tuple[int, str]]:
    """Identifiers that a module defines or uses."""
    for node in ast.walk(ast.parse(source)):
        for key in ("id", "attr", "arg", "name"):
            if isinstance(value := getattr(node, key, None), str) and hasattr(node, "lineno"):
                yield node.lineno, value


@cache
def replaced(name: str) -> list[str]:
    """The words of an identifier that have a replacement in `NAMES`."""
    words = re.sub(r"(?<=[a-z0-9])([A-Z])", r"_\1", name).lower().replace("fine_tuned", "")
    return [word for word in re.findall(r"[a-z]+", words) if word in NAMES]


@pytest.mark.parametrize("phrase", PHRASES, ids=lambda phrase: phrase.example)
def test_each_phrase_is_found_in_its_example_and_not_in_its_replacement(phrase: Phrase) -> None:
    assert phrase.found(phrase.example) and ANY.search(phrase.example)
    assert not phrase.found(phrase.instead)


def test_plain_sentences_pass() -> None:
    plain = "There is no adapter. It is no longer served. A step takes a second. Tokens per second. A replica reports."
    assert not [match for phrase in PHRASES for match in phrase.found(plain)]


def test_messages_and_comments_are_distinguished() -> None:
    source = '"""A doc."""\n# one\n# two\ndef f():\n    """Another."""\n    return f"it {f} is"  # three\n'
    assert [text for _, text in messages(source) if text] == ["it ", " is"]
    assert sorted(text for _, text in comments(source)) == ["A doc.", "Another.", "one two", "three"]


def test_messages_are_in_plain_words() -> None:
    found = [line for path in sources() for line in problems(path, messages(path.read_text(encoding="utf-8")))]
    assert not found, "\n".join(found)


def test_comments_are_in_plain_words() -> None:
    found = [
        line
        for path in sources((*PACKAGES, *DATA))
        for line in problems(path, comments(path.read_text(encoding="utf-8")))
    ]
    assert not found, "\n".join(found)


def test_the_documentation_is_in_plain_words() -> None:
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*.md"), *ROOT.glob("benchmarks/*.md")]
    found = [line for page in pages for line in problems(page, iter([(0, prose(page.read_text(encoding="utf-8")))]))]
    assert not found, "\n".join(found)


def test_no_identifier_has_a_word_that_was_replaced() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {name}: use {NAMES[part]}"
        for path in sources((*PACKAGES, *DATA))
        for line, name in names(path.read_text(encoding="utf-8"))
        for part in replaced(name)
    ]
    assert not found, "\n".join(sorted(set(found)))
