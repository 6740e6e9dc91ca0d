"""Positions of tokens in the text of an answer."""

from __future__ import annotations

import codecs

from loramill.serve.protocol import TokenText


class TextOffsets:
    """Counts the characters of an answer by its tokens' bytes. Several tokens may form one character."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._characters = 0

    def next_offset(self, token: TokenText, end: int | None = None) -> int:
        """Returns where the text of the next token begins, in characters: at the character of its first byte.

        Args:
            token: the next token.
            end: length of the whole answer in characters, which a stop string may have shortened.
        """
        raw = token.raw or b""
        if raw and raw[0] & 0xC0 != 0x80:  # a new character, which ends an incomplete one
            self._characters += len(self._decoder.decode(b"", True))
            self._decoder.reset()
        offset = self._characters
        self._characters += len(self._decoder.decode(raw))
        return offset if end is None else min(offset, end)
