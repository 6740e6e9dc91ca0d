"""The bytes of a token, from the vocabulary: a token may be a part of a character, which decoded text can't show."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenBytes:
    """The bytes that each token of a tokenizer adds to a text.

    Joined over the tokens of a text, they are that text in UTF-8. They are read from the vocabulary in the way of the
    tokenizer's decoder: GPT-2's alphabet of bytes, or sentencepiece's pieces with U+2581 for a space and `<0xF0>` for a
    byte. With other decoders, a token's bytes are those of its decoded text.

    Args:
        tokenizer: the tokenizer.
        special: ids of special tokens, which decoding leaves out.
    """

    def __init__(self, tokenizer: Tokenizer, special: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._special = special

    def bytes_of(self, token: int, *, first: bool = False) -> bytes | None:
        """The bytes of a token; None if it adds nothing to a text because it is special or not in the vocabulary.

        Args:
            token: its id.
            first: whether it begins a text, where some decoders drop a leading space.
        """
        piece = self._tokenizer.id_to_token(token)
        if piece is None or token in self._special:
            return None
        steps = self._steps
        if "ByteLevel" in steps:
            letters = [_BYTE_ALPHABET.get(letter) for letter in piece]
            return piece.encode() if None in letters else bytes(letter for letter in letters if letter is not None)
        if not steps.keys() <= _SENTENCEPIECE or not steps:
            text: str = self._tokenizer.decode([token])
            return text.encode()
        if "ByteFallback" in steps and (byte := _BYTE.fullmatch(piece)):
            return bytes([int(byte[1], 16)])
        if "Metaspace" in steps:
            never = steps["Metaspace"].get("prepend_scheme") == "never"
            return piece.replace(steps["Metaspace"]["replacement"], "" if first and not never else " ").encode()
        if "Replace" in steps:
            piece = piece.replace(steps["Replace"]["pattern"].get("String", ""), steps["Replace"]["content"])
        strip = steps.get("Strip", {"content": " ", "start": 0})
        for _ in range(strip["start"] if first else 0):
            piece = piece.removeprefix(strip["content"])
        return piece.encode()

    def text(self, token: int, *, first: bool = False) -> str:
        r"""A token for display: its text; `\xf0\x9f` if its bytes are not text; the name of a special token."""
        found = self.bytes_of(token, first=first)
        return self.piece(token) if found is None else bytes_as_text(found)

    def piece(self, token: int) -> str:
        """A token's entry in the vocabulary, which is unique."""
        return self._tokenizer.id_to_token(token) or f"token_id:{token}"

    @cached_property
    def _steps(self) -> Mapping[str, Mapping[str, Any]]:
        """The decoder's steps by their type."""
        decoder = self._tokenizer.decoder
        if decoder is None:
            return {}
        described = json.loads(decoder.__getstate__())
        return {step["type"]: step for step in described.get("decoders", [described])}


def bytes_as_text(found: bytes) -> str:
    r"""Bytes as text, or as OpenAI writes bytes that are not text: `\xf0\x9f`."""
    if is_utf8(found):
        return found.decode()
    return "".join(chr(byte) if 0x20 <= byte < 0x7F else f"\\x{byte:02x}" for byte in found)


def is_utf8(found: bytes) -> bool:
    """Whether bytes are complete characters in UTF-8."""
    try:
        found.decode()
    except UnicodeDecodeError:
        return False
    return True


_SENTENCEPIECE = frozenset({"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"})


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: a printable byte is its own character, the others begin at U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + at): byte for at, byte in enumerate(others)}


_BYTE_ALPHABET = _byte_alphabet()
