"""What a scorer or a judge gets: the question, the reference and the answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from loramill.data.conversation import to_request_messages
from loramill.data.examples import Example


@dataclass(frozen=True, slots=True)
class AnsweredExample:
    """An example with the answer of a candidate."""

    example: Example
    answer: str

    @property
    def question(self) -> str | list[dict[str, Any]]:
        """The prompt, or the messages before the answer in OpenAI's format."""
        if self.example.prompt is not None:
            return self.example.prompt
        return to_request_messages(self.example.messages[:-1])

    @property
    def question_text(self) -> str:
        """The question as one text."""
        if self.example.prompt is not None:
            return self.example.prompt
        return "\n".join(f"{each['role']}: {each['content']}" for each in self.example.messages[:-1])
