"""Structured output: grammars that llguidance compiles for a base's tokens, and a token mask per answer."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from loramill.data.messages import CALL_BEGIN, CALL_END
from loramill.data.tokenizer import ChatTokenizer
from loramill.errors import BaseUnusable, InvalidRequest, LoramillError
from loramill.serve.engine import TokenMask
from loramill.serve.protocol import OutputConstraint
from loramill.serve.replica.grammar import build_grammar

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

#: Maximum number of characters of a grammar; a schema of this size compiles in under a second.
MAX_GRAMMAR_CHARACTERS = 1 << 16
#: Number of compiled grammars in the cache: at most some hundred KB each.
_CACHED_GRAMMARS = 64
#: Masks are computed in the engine's thread, so that one must take at most a few milliseconds, and little memory.
_LEXER_FUEL, _ITEMS, _LEXER_STATES = 50_000, 20_000, 50_000


class ConstraintCompiler:
    """Compiles constraints to token masks for one base.

    Args:
        tokenizer: the base's tokenizer.
        vocabulary: number of logits per position, at least the tokenizer's number of ids.
    """

    def __init__(self, tokenizer: ChatTokenizer, vocabulary: int) -> None:
        self._chat_tokenizer = tokenizer
        self._vocabulary = vocabulary
        # A thread of its own: compiling would block the event loop or the engine for long.
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._compiled = lru_cache(_CACHED_GRAMMARS)(self._compile)

    async def mask_factory(self, constraint: OutputConstraint) -> Callable[[], TokenMask]:
        """Compiles a constraint; returns a function that makes a mask for one answer.

        Raises:
            InvalidRequest: the schema is too large, is invalid, or uses what llguidance cannot enforce.
            BaseUnusable: llguidance cannot read the base's tokenizer.
        """
        matcher = await asyncio.get_running_loop().run_in_executor(self._pool, self._matcher, constraint)
        return lambda: _GrammarMask(matcher.deep_copy(), self._vocabulary, constraint.param)

    def close(self) -> None:
        """Stops the thread."""
        self._pool.shutdown(cancel_futures=True)

    def _matcher(self, constraint: OutputConstraint) -> LLMatcher:
        try:
            return self._compiled(build_grammar(constraint, self._tag(CALL_BEGIN), self._tag(CALL_END)))
        except InvalidRequest as error:
            raise InvalidRequest(f"'{constraint.param}': {error.message}", param=constraint.param) from error

    def _compile(self, grammar: str) -> LLMatcher:
        from llguidance import LLMatcher, LLParserLimits

        if len(grammar) > MAX_GRAMMAR_CHARACTERS:
            raise InvalidRequest(
                f"the schemas have more than {MAX_GRAMMAR_CHARACTERS} characters together; make them smaller."
            )
        limits = LLParserLimits(
            step_lexer_fuel=_LEXER_FUEL, step_max_items=_ITEMS, max_lexer_states=_LEXER_STATES, verbose_errors=False
        )
        matcher = LLMatcher(self._grammar_tokenizer, grammar, limits=limits, log_level=0)
        if matcher.is_error():
            raise InvalidRequest(f"{_reason(matcher)}.")
        bits = _allowed_bits(matcher, self._vocabulary)
        first = np.flatnonzero(np.unpackbits(bits, count=self._vocabulary, bitorder="little"))
        if not np.setdiff1d(first, self._chat_tokenizer.stop_ids).size:
            raise InvalidRequest("nothing satisfies the schema.")
        return matcher

    @cached_property
    def _grammar_tokenizer(self) -> LLTokenizer:
        # Created at the first use: it takes a quarter of a second and some memory.
        from llguidance import LLTokenizer

        try:
            return LLTokenizer(
                self._chat_tokenizer.tokenizer_json,
                n_vocab=self._vocabulary,
                eos_token=list(self._chat_tokenizer.stop_ids),
                slices=LLTokenizer.json_slices(),
            )
        except ValueError as error:
            raise BaseUnusable(f"No grammar can be used with this base's tokenizer: {error}.") from error

    def _tag(self, tag: str) -> str:
        """A tag as a terminal: its token if it is a single special token, else its text."""
        tokens = self._grammar_tokenizer.tokenize_str(tag, parse_special=True)
        alone = len(tokens) == 1 and self._grammar_tokenizer.is_special_token(tokens[0])
        return f"<[{tokens[0]}]>" if alone else json.dumps(tag)


class _GrammarMask:
    """The state of one answer in a grammar."""

    def __init__(self, matcher: LLMatcher, vocabulary: int, param: str) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._param = param

    @property
    def finished(self) -> bool:
        """Whether only a stop token could follow."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    @property
    def error(self) -> LoramillError | None:
        """The error of llguidance, if the grammar takes too long."""
        if not self._matcher.is_error():
            return None
        return InvalidRequest(
            f"'{self._param}': the schema is too complex to continue the answer: {_reason(self._matcher)}.",
            param=self._param,
        )

    def allowed_bits(self) -> npt.NDArray[np.uint8]:
        """The tokens after which the grammar can still be satisfied; after an error, the stop tokens."""
        return _allowed_bits(self._matcher, self._vocabulary)

    def accept(self, token: int) -> None:
        """Advances by a token."""
        self._matcher.consume_token(token)


def _allowed_bits(matcher: LLMatcher, vocabulary: int) -> npt.NDArray[np.uint8]:
    bits = np.zeros(-(-vocabulary // 32), np.uint32)
    matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
    return bits.view(np.uint8)[: -(-vocabulary // 8)]


def _reason(matcher: LLMatcher) -> str:
    """llguidance's message in one line, without its position in the grammar and a listing of the grammar."""
    text = re.sub(
        r"^at \d+\(\d+\): |failed to compile JSON schema: |\n +\d+ \| .*|<non-verbose/>", "", matcher.get_error()
    )
    return " ".join(text.split())[:300].rstrip(" ^.")
