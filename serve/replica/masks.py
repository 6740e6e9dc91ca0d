"""Answers held to a form: grammars compiled for a base's tokens by llguidance, and a mask for each answer."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from loramill.data.tokenizer import CALL_BEGIN, CALL_END, ChatTokenizer
from loramill.errors import BaseUnusable, InvalidRequest, LoramillError
from loramill.serve.engine import TokenMask
from loramill.serve.protocol import OutputConstraint
from loramill.serve.replica.grammar import build_grammar

#: Characters of a grammar; a schema of this size takes under a second to compile.
MAX_GRAMMAR_CHARACTERS = 1 << 16
#: Compiled grammars that are kept: some hundred KB each, most of them less.
_CACHED_GRAMMARS = 64

#: Masks are made in the engine's thread, so one may take a few milliseconds at the very most, and not much memory.
_LIMITS = LLParserLimits(step_lexer_fuel=50_000, step_max_items=20_000, max_lexer_states=50_000, verbose_errors=False)


class ConstraintCompiler:
    """Makes masks for one base.

    Args:
        tokenizer: its tokenizer.
        vocabulary: logits of a row, at least as many as the tokenizer has ids.
    """

    def __init__(self, tokenizer: ChatTokenizer, vocabulary: int) -> None:
        self._chat_tokenizer = tokenizer
        self._vocabulary = vocabulary
        # Not in the event loop, and not in the engine's thread: compiling may take long.
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._compiled = lru_cache(_CACHED_GRAMMARS)(self._compile)

    async def mask_factory(self, constraint: OutputConstraint) -> Callable[[], TokenMask]:
        """What makes a mask for each answer of a form.

        Raises:
            InvalidRequest: it is too large, makes no sense, or uses what llguidance can't enforce; it names the param.
            BaseUnusable: llguidance can't read the base's tokenizer.
        """
        matcher = await asyncio.get_running_loop().run_in_executor(self._pool, self._matcher, constraint)
        return lambda: _GrammarMask(matcher.deep_copy(), self._vocabulary, constraint.param)

    def close(self) -> None:
        """Ends the thread."""
        self._pool.shutdown(cancel_futures=True)

    def _matcher(self, constraint: OutputConstraint) -> LLMatcher:
        try:
            return self._compiled(build_grammar(constraint, self._tag(CALL_BEGIN), self._tag(CALL_END)))
        except InvalidRequest as error:
            raise InvalidRequest(f"'{constraint.param}': {error.message}", param=constraint.param) from error

    def _compile(self, grammar: str) -> LLMatcher:
        if len(grammar) > MAX_GRAMMAR_CHARACTERS:
            raise InvalidRequest(
                f"the schemas have over {MAX_GRAMMAR_CHARACTERS} characters together; make them smaller."
            )
        matcher = LLMatcher(self._grammar_tokenizer, grammar, limits=_LIMITS, log_level=0)
        if matcher.is_error():
            raise InvalidRequest(f"{_reason(matcher)}.")
        first = np.flatnonzero(_allowed(matcher, self._vocabulary))
        if not np.setdiff1d(first, self._chat_tokenizer.stop_ids).size:
            raise InvalidRequest("nothing satisfies the schema.")
        return matcher

    @cached_property
    def _grammar_tokenizer(self) -> LLTokenizer:
        # Made when it is first asked for: it takes a quarter of a second and some memory.
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
        """A tag as a terminal: the one token that it is, or its text."""
        tokens = self._grammar_tokenizer.tokenize_str(tag, parse_special=True)
        alone = len(tokens) == 1 and self._grammar_tokenizer.is_special_token(tokens[0])
        return f"<[{tokens[0]}]>" if alone else json.dumps(tag)


class _GrammarMask:
    """One answer on its way through a grammar."""

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
        """What llguidance met with, which is a grammar that takes it too long."""
        if not self._matcher.is_error():
            return None
        return InvalidRequest(
            f"'{self._param}': the answer can't go on, for the schema is too complex: {_reason(self._matcher)}.",
            param=self._param,
        )

    def allowed(self) -> npt.NDArray[np.bool_]:
        """The tokens by which the grammar can still be satisfied; after an error, those that stop."""
        return _allowed(self._matcher, self._vocabulary)

    def accept(self, token: int) -> None:
        """Goes on by a token."""
        self._matcher.consume_token(token)


def _allowed(matcher: LLMatcher, vocabulary: int) -> npt.NDArray[np.bool_]:
    bits = np.zeros(-(-vocabulary // 32), np.uint32)
    matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
    return np.unpackbits(bits.view(np.uint8), count=vocabulary, bitorder="little").view(np.bool_)


def _reason(matcher: LLMatcher) -> str:
    """llguidance's message in one line, without its place in our grammar and a listing of that."""
    text = re.sub(
        r"^at \d+\(\d+\): |failed to compile JSON schema: |\n +\d+ \| .*|<non-verbose/>", "", matcher.get_error()
    )
    return " ".join(text.split())[:300].rstrip(" ^.")
