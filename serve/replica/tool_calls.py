"""Finds tool calls in the text of an answer while it is generated. They are as Hermes and Qwen write them:

<tool_call>
{"name": "weather", "arguments": {"town": "Oslo"}}
</tool_call>
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TypeAlias

from loramill.data.messages import CALL_BEGIN, CALL_END
from loramill.serve.replica.stop_strings import partial_match_length


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A tool call of the model; `arguments` is a JSON object, as text."""

    name: str
    arguments: str


#: Texts and calls, in order.
Parts: TypeAlias = list[str | ToolCall]

#: The content of a call: up to the first end tag outside of its strings.
_INSIDE = re.compile(rf'((?:[^"<]++|"(?:[^"\\]++|\\.)*+"|<(?!{CALL_END[1:]}))*+){CALL_END}', re.DOTALL)


class ToolCallScanner:
    """Separates calls from text.

    Text that may still become a call is held back. If its content is not an object with `name` and `arguments`, it is
    text after all; a call that lacks only its end tag is a call. White space before a call and after the last one is a
    part of the markup.
    """

    def __init__(self) -> None:
        self._held = ""
        self._called = False

    def push(self, text: str) -> Parts:
        """Returns the parts that are certain by now."""
        self._held += text
        parts: Parts = []
        while (begin := self._held.find(CALL_BEGIN)) >= 0:
            # Usually there is no end tag at all, which is a quick check.
            found = _INSIDE.match(self._held, begin + len(CALL_BEGIN)) if CALL_END in self._held else None
            if found is None:
                break
            parts += self._emit_call(begin, found[1], found.end())
        certain = begin if begin >= 0 else len(self._held) - partial_match_length(self._held, (CALL_BEGIN,))
        return parts + self._emit_text(len(self._held[:certain].rstrip()))

    def finish(self) -> Parts:
        """Returns the parts that were held back, when the answer ends."""
        parts: Parts = []
        while (begin := self._held.find(CALL_BEGIN)) >= 0:
            parts += self._emit_call(begin, self._held[begin + len(CALL_BEGIN) :], len(self._held)) + self.push("")
        return parts + ([] if self._called and self._held.isspace() else self._emit_text(len(self._held)))

    def _emit_call(self, begin: int, inside: str, end: int) -> Parts:
        """The call between two positions; or its tag as text, since a call may still follow."""
        if (call := _call(inside)) is None:
            return self._emit_text(begin + len(CALL_BEGIN))
        before = self._held[:begin].rstrip()
        self._held, self._called = self._held[end:], True
        return [before, call] if before else [call]

    def _emit_text(self, count: int) -> Parts:
        text, self._held = self._held[:count], self._held[count:]
        return [text] if text else []


def _call(inside: str) -> ToolCall | None:
    try:
        value = json.loads(inside)
        if not isinstance(value, dict):
            return None
        name, arguments = value.get("name"), value.get("arguments", {})
        if not (isinstance(name, str) and name and isinstance(arguments, dict)):
            return None
        call = ToolCall(name, json.dumps(arguments, ensure_ascii=False, allow_nan=False))
        f"{call.name}{call.arguments}".encode()
    except (ValueError, RecursionError):  # not JSON, or numbers and characters that JSON can express and parsers cannot
        return None
    return call
