"""Text to tokens and back, where special tokens that users write are plain text.

Users never write markup: a special token spelled in a message (`<|im_end|>`) is encoded as the characters it is made
of. Only the chat template opens and closes roles.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer

from loramill.data.token_bytes import TokenBytes
from loramill.errors import InvalidRequest

#: Put before a special token that a user wrote. No text contains it already: a lone surrogate isn't UTF-8.
_ESCAPE = "\ud800"


class TextCodec:
    """A tokenizer of `tokenizers` that distinguishes the special tokens of a template from those that users wrote.

    Args:
        tokenizer_json: the text of tokenizer.json.

    Attributes:
        special: ids of the special tokens, by their text.
        vocabulary_size: number of ids.
    """

    def __init__(self, tokenizer_json: str) -> None:
        self._markup = Tokenizer.from_str(tokenizer_json)
        self._plain = Tokenizer.from_str(tokenizer_json)
        self._plain.encode_special_tokens = True
        for each in (self._markup, self._plain):  # some files set these, and no text may be cut or filled here
            each.no_truncation()
            each.no_padding()
        added = self._markup.get_added_tokens_decoder()
        self.special = {token.content: id_ for id_, token in added.items() if token.special}
        self.vocabulary_size: int = self._markup.get_vocab_size()
        either = "|".join(re.escape(text) for text in sorted(self.special, key=len, reverse=True)) or r"(?!)"
        self._written = re.compile(f"(?={either})")
        self._unescaped = re.compile(f"(?<!{_ESCAPE})({either})")

    def escape(self, value: Any, param: str = "") -> Any:
        """Text, or JSON, with an escape before each special token that is written in it.

        Raises:
            InvalidRequest: a text isn't Unicode; `param` names it.
        """
        if isinstance(value, str):
            return self._written.sub(_ESCAPE, check_unicode(value, param))
        if isinstance(value, Mapping):
            return {self.escape(key, param): self.escape(item, param) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.escape(item, param) for item in value]
        return value

    def encode(self, text: str) -> list[int]:
        """Tokens of a template's text, in which users' special tokens are escaped."""
        if _ESCAPE not in text:
            ids: list[int] = self._markup.encode(text, add_special_tokens=False).ids
            return ids
        tokens: list[int] = []
        for index, piece in enumerate(self._unescaped.split(text)):
            tokens += [self.special[piece]] if index % 2 else self.encode_plain(piece.replace(_ESCAPE, ""))
        return tokens

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text."""
        plain = (text for text in texts if _ESCAPE not in text)
        found = iter(self._markup.encode_batch_fast(list(plain), add_special_tokens=False))
        return [self.encode(text) if _ESCAPE in text else next(found).ids for text in texts]

    def encode_plain(self, text: str) -> list[int]:
        """Tokens of text without markup."""
        ids: list[int] = self._plain.encode(text, add_special_tokens=False).ids
        return ids

    def encode_rest(self, prompt: list[int], whole: list[int], rest: str) -> list[int]:
        """Tokens of `rest`, the text after a prompt.

        They are the end of `whole` where the tokenizer keeps the boundary (some write a word's first piece differently
        at the beginning of a text). Where it merges across the boundary, `rest` is encoded by itself.

        Args:
            prompt: tokens of the prompt.
            whole: tokens of the prompt and the rest together.
            rest: with special tokens escaped.
        """
        return whole[len(prompt) :] if whole[: len(prompt)] == prompt else self.encode(rest)

    def begins_with(self, token: int | None) -> bool:
        """Whether the tokenizer itself puts this token before every text."""
        return token in self._markup.encode("").ids

    def token_to_id(self, token: str) -> int | None:
        """The id of a token of the vocabulary."""
        found: int | None = self._markup.token_to_id(token)
        return found

    def decode(self, tokens: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of tokens; bytes that are not UTF-8 become U+FFFD."""
        text: str = self._markup.decode(list(tokens), skip_special_tokens=skip_special)
        return text

    @cached_property
    def token_bytes(self) -> TokenBytes:
        """The bytes that each token adds to a text."""
        return TokenBytes(self._markup, frozenset(self.special.values()))

    @property
    def tokenizer_json(self) -> str:
        """The text of a tokenizer.json that makes the same tokens."""
        text: str = self._markup.to_str()
        return text


def check_unicode(text: object, param: str) -> str:
    """The text, if it is a string that UTF-8 can express.

    Raises:
        InvalidRequest: it is not; `param` names it.
    """
    if not isinstance(text, str):
        raise InvalidRequest(f"{param} must be a string.", param=param)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"{param} contains a lone surrogate (invalid Unicode).", param=param) from error
    return text
