"""A base's chat templates: renders conversations in the form that the template takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import cached_property, partial
from typing import Any

from loramill.data.chat_template.dialect import TemplateRefusedError, compile_template, render_template
from loramill.data.chat_template.support import TemplateSupport, adapt_message, detect_support
from loramill.errors import BaseUnusable, InvalidRequest


class ChatTemplate:
    """A base's compiled chat templates, and what they support.

    Args:
        templates: templates by name; "default" is rendered, or "tool_use", if it exists, when there are tools.
        tokens: values of `bos_token` and the other token variables.

    Raises:
        BaseUnusable: a template has an error, or drops messages of users or the assistant.
    """

    def __init__(self, templates: Mapping[str, str], tokens: Mapping[str, str]) -> None:
        self.source = "\n".join(templates.values())
        self._tokens = dict(tokens)
        self._default = compile_template(templates["default"])
        self._tool_use = compile_template(templates["tool_use"]) if "tool_use" in templates else self._default
        dropped = self.support.dropped & {"user", "assistant"}
        if dropped:
            raise BaseUnusable(
                f"the chat template drops the content of {' and '.join(sorted(dropped))} messages, as a text and as a "
                "list of parts. Correct the template, or remove it to serve completions only."
            )

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] = (),
        now: datetime | None = None,
    ) -> str:
        """The text of a conversation.

        Args:
            messages: plain JSON, each with a role and a text as its content; arguments of calls are objects.
            add_generation_prompt: whether the text ends where the assistant's answer begins.
            tools: tools for the assistant; an empty sequence is None in the template.
            now: the time for `strftime_now`; None: the current time, in UTC.

        Raises:
            InvalidRequest: the template raises, exceeds its steps or characters, or drops a role's text.
        """
        support = self.support
        for index, message in enumerate(messages):
            if message["role"] in support.dropped:
                raise InvalidRequest(
                    f"This base's chat template drops {message['role']} messages: write the text into a user message.",
                    param=f"messages[{index}].role",
                )
        try:
            return self._render(
                [adapt_message(message, support) for message in messages], add_generation_prompt, tools, now
            )
        except TemplateRefusedError as error:
            raise InvalidRequest(f"The base's chat template refuses this: {error}", param="messages") from error

    @cached_property
    def support(self) -> TemplateSupport:
        """What the template supports."""
        return detect_support(partial(self._render, add_generation_prompt=True), self.source)

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] = (),
        now: datetime | None = None,
    ) -> str:
        variables = {
            **self._tokens,
            "messages": list(messages),
            "tools": list(tools) or None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            "strftime_now": (now or datetime.now(UTC)).strftime,
        }
        return render_template(self._tool_use if tools else self._default, variables)
