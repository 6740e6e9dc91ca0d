"""Fingerprints of examples: a digest that equal content shares, and a sketch that similar content shares in part.

A sketch is the set of hashes of a text's trigrams of characters, which works in scripts without spaces too; of a long
text, the smallest hashes. It is a MinHash of the bottom-k kind: two sketches give the Jaccard similarity of two texts,
exactly for short ones, and still do after the same trigrams were removed from both. The hash is fixed here, so that
sketches in the database stay comparable whatever libraries are installed.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from loramill.data.conversation import answer_text
from loramill.data.examples import Example

#: Most hashes of a sketch: 1 KiB per example in the database. The standard error of a similarity of 0.8 is 0.025.
SKETCH_SIZE = 256
#: Characters of a shingle. One wrong letter in a message of 57 characters leaves a similarity of 0.8 in 98% of cases;
#: with 5 characters in 75% (CLINC150, banking).
SHINGLE = 3

Sketch = npt.NDArray[np.uint32]


@dataclass(frozen=True, slots=True, eq=False)
class Fingerprint:
    """An example's content.

    Attributes:
        digest: equal for two examples whose content differs at most in case, white space and Unicode forms.
        sketch: sorted hashes of the messages' trigrams; instructions of the system and tools are left out, since all
            examples of an adapter may share them.
    """

    digest: str
    sketch: Sketch


def normalize(text: str) -> str:
    """A text without what does not change its meaning: Unicode form, case, and amount of white space."""
    return " ".join(unicodedata.normalize("NFKC", text).lower().split())


def fingerprints(examples: Sequence[Example]) -> list[Fingerprint]:
    """The fingerprints of examples, in their order."""
    found = sketches([dialog(example) for example in examples])
    return [Fingerprint(digest(each), sketch) for each, sketch in zip(examples, found, strict=True)]


def digest(example: Example) -> str:
    """SHA-256 of the normalized content: instructions, tools and weights as well as messages."""
    content = [
        [[message["role"], normalize(message["content"]), message.get("tool_calls")] for message in example.messages],
        None if example.prompt is None else [normalize(example.prompt), normalize(example.completion)],
        example.tools,
        example.weights,
    ]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def dialog(example: Example) -> str:
    """The messages of an example as one text, normalized, without the system's instructions."""
    if example.prompt is not None:
        return f"{normalize(example.prompt)}\n{normalize(example.completion)}"
    messages = []
    for message in example.messages:
        if message["role"] not in ("system", "developer"):
            calls = [
                (call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls", [])
            ]
            messages.append(normalize(answer_text(message["content"], calls)))
    return "\n".join(messages)


def sketches(texts: Sequence[str]) -> list[Sketch]:
    """The sketches of texts, computed together: 50 texts one by one take ten times as long."""
    if not texts:
        return []
    # A mark at both ends gives every text a trigram.
    encoded = [np.frombuffer(f"\x02{text}\x03".encode("utf-32-le"), dtype="<u4") for text in texts]
    characters = np.concatenate(encoded).astype(np.uint64)
    lengths = np.array([len(each) for each in encoded])
    row = np.repeat(np.arange(len(texts), dtype=np.uint64), lengths)
    # A code point has 21 bits.
    packed = sum((characters[i : len(characters) - SHINGLE + 1 + i] << np.uint64(21 * i)) for i in range(SHINGLE))
    inside = row[: 1 - SHINGLE] == row[SHINGLE - 1 :]
    hashes = _mix(np.asarray(packed)[inside]) >> np.uint64(32)
    keys = np.unique((row[: 1 - SHINGLE][inside] << np.uint64(32)) | hashes)
    rows, values = keys >> np.uint64(32), keys.astype(np.uint32)
    ends = np.searchsorted(rows, np.arange(1, len(texts), dtype=np.uint64))
    return [each[:SKETCH_SIZE] for each in np.split(values, ends)]


def _mix(value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's finalizer (Steele, Lea, Flood 2014)."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
