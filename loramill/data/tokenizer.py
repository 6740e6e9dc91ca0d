"""A base's tokenizer with its chat template: the one place where conversations become tokens.

Serving and training both use it. It reads the files of a Hugging Face folder with `tokenizers` and `jinja2` alone, so
that a gateway needs no torch.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from loramill.data.chat_template import ChatTemplate, read_templates, templates_by_name
from loramill.data.messages import CALL_BEGIN, CALL_END, TEMPLATE_ROLES, Message, first_tool_param
from loramill.data.text_codec import TextCodec, check_unicode
from loramill.data.token_bytes import TokenBytes
from loramill.errors import BaseUnusable, InvalidRequest, UnsupportedParameter


class ChatTokenizer:
    """A base's tokenizer and chat template.

    Args:
        tokenizer_json: the text of tokenizer.json.
        settings: tokenizer_config.json, with the chat templates.
        generation: config.json and generation_config.json, for the ids of the end and of padding.

    Attributes:
        codec: text to tokens and back.
        stop_ids: ids that end an answer; training teaches the first.
        pad_id: id for padding, never the end that training teaches.

    Raises:
        BaseUnusable: no end token is named, or a chat template can't be used.
    """

    def __init__(self, tokenizer_json: str, settings: Mapping[str, Any], generation: Mapping[str, Any]) -> None:
        self.codec = TextCodec(tokenizer_json)
        texts = {name: _token_text(settings.get(f"{name}_token")) for name in ("bos", "eos", "pad", "unk")}
        ids = {name: self.codec.token_to_id(text) for name, text in texts.items() if text}
        self.stop_ids = _as_ids(generation.get("eos_token_id")) or _as_ids(ids.get("eos"))
        if not self.stop_ids:
            raise BaseUnusable("The base names no end token; set eos_token_id in generation_config.json.")
        pads = (*_as_ids(generation.get("pad_token_id")), *_as_ids(ids.get("pad")), *self.codec.special.values(), 0)
        self.pad_id = next((id_ for id_ in pads if id_ != self.stop_ids[0]), 1)

        templates = templates_by_name(settings.get("chat_template"))
        tokens = {f"{name}_token": text for name, text in texts.items() if text is not None}
        self._template = ChatTemplate(templates, tokens) if "default" in templates else None
        self._pinned_time: datetime | None = None
        adds_bos = settings.get("add_bos_token", self.codec.begins_with(ids.get("bos")))
        self._prefix = _as_ids(ids.get("bos")) if adds_bos else ()

    @classmethod
    def load(cls, folder: Path) -> ChatTokenizer:
        """Reads the tokenizer of a Hugging Face folder.

        Raises:
            BaseUnusable: a file is missing or damaged, or no end token is named.
        """
        settings = _read_json(folder / "tokenizer_config.json")
        generation = _read_json(folder / "config.json") | _read_json(folder / "generation_config.json")
        try:
            settings["chat_template"] = read_templates(folder, settings)
            return cls((folder / "tokenizer.json").read_text(encoding="utf-8"), settings, generation)
        except BaseUnusable as error:
            raise BaseUnusable(f"{folder}: {error.message}") from error
        except Exception as error:  # tokenizers raises nothing narrower
            raise BaseUnusable(f"The tokenizer in {folder} can't be read: {error}. Copy it again.") from error

    @property
    def vocabulary_size(self) -> int:
        """Number of ids."""
        return self.codec.vocabulary_size

    @property
    def tokenizer_json(self) -> str:
        """The text of a tokenizer.json that makes the same tokens."""
        return self.codec.tokenizer_json

    @property
    def token_bytes(self) -> TokenBytes:
        """The bytes that each token adds to a text."""
        return self.codec.token_bytes

    # What the chat template supports

    @cached_property
    def supports_tool_calls(self) -> bool:
        """Whether the template renders tools and their results, and has the model call them by `CALL_BEGIN`."""
        support = self._template.support if self._template else None
        # Special tokens would be missing in the answer's text.
        return (
            support is not None
            and support.tools
            and support.tool_calls
            and CALL_BEGIN in support.rendered_tool
            and not self.codec.special.keys() & {CALL_BEGIN, CALL_END}
        )

    @property
    def renders_tool_calls(self) -> bool:
        """Whether the template renders tools, calls and their results in some form, so that they can be trained."""
        return self._template is not None and self._template.support.tools and self._template.support.tool_calls

    @cached_property
    def chat_problem(self) -> str | None:
        """Why this base can't chat, as the end of a sentence; None if it can."""
        if self._template is None:
            return "it has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json)"
        refusal = self._template.support.refusal
        return None if refusal is None else f"its chat template refuses every conversation: {refusal}"

    # Text to tokens and back

    def at_time(self, moment: datetime) -> ChatTokenizer:
        """A copy whose template gets `moment` as the current time, so that it always renders the same."""
        pinned = copy.copy(self)
        pinned._pinned_time = moment
        return pinned

    def encode_chat(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """Tokens of a conversation up to where the assistant's answer begins.

        Args:
            messages: the conversation.
            tools: tools for the assistant, each `{"type": "function", "function": {"name": …, …}}`.

        Raises:
            InvalidRequest: no messages, an unknown role, invalid Unicode, or the template refuses.
            UnsupportedParameter: there are tools, calls or results, and the template does not support them.
        """
        if (param := first_tool_param(messages, tools)) and not self.supports_tool_calls:
            raise UnsupportedParameter(
                "This base's chat template does not support tools, or not in a form that can be read here: leave "
                f"'{param}' out, or use a base whose template has tools called by {CALL_BEGIN}.",
                param=param,
            )
        return self.codec.encode(self.render(messages, add_generation_prompt=True, tools=tools))

    def encode_text(self, text: str) -> list[int]:
        """Tokens of a plain completion's prompt, with a bos token only if the model requires it.

        Raises:
            InvalidRequest: invalid Unicode.
        """
        return [*self._prefix, *self.codec.encode_plain(check_unicode(text, "prompt"))]

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool, tools: Sequence[Mapping[str, Any]] = ()
    ) -> str:
        """The template's text, with an escape before each special token that a message or a tool contains.

        Serving and training both render conversations here: training compares the text up to the generation prompt with
        the text that has the answer.

        Args:
            messages: the conversation.
            add_generation_prompt: whether the text ends where the assistant's answer begins.
            tools: tools for the assistant.

        Raises:
            InvalidRequest: no template, no messages, an unknown role, invalid Unicode, or the template refuses.
        """
        if self._template is None:
            raise InvalidRequest("This base has no chat template; use plain completions.", param="messages")
        if not messages:
            raise InvalidRequest("messages is empty; send at least one.", param="messages")
        escaped = []
        for index, message in enumerate(messages):
            where = f"messages[{index}]"
            if message["role"] not in TEMPLATE_ROLES:
                raise InvalidRequest(f"{where}.role must be one of {', '.join(TEMPLATE_ROLES)}.", param=f"{where}.role")
            check_unicode(message["content"], f"{where}.content")
            escaped.append({key: self.codec.escape(value, f"{where}.{key}") for key, value in message.items()})
        return self._template.render(
            escaped,
            add_generation_prompt=add_generation_prompt,
            tools=self.codec.escape(list(tools), "tools"),
            now=self._pinned_time,
        )

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens without special tokens; bytes that are not UTF-8 become U+FFFD."""
        return self.codec.decode(tokens)

    def decode_with_special_tokens(self, tokens: Sequence[int]) -> str:
        """The text of tokens with special tokens, as the chat template wrote it."""
        return self.codec.decode(tokens, skip_special=False)


class IncrementalDecoder:
    """Turns an answer's tokens into text while they arrive.

    The texts that `push` and `finish` return, joined, are `decode` of all tokens; none ends within a character.
    """

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._emitted = 0

    def push(self, tokens: Sequence[int]) -> str:
        """The text that these tokens complete; it may be empty."""
        self._window += tokens
        text = self._new_text()
        if not text or text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        # The last tokens stay as context: some tokenizers write a word's space only after another word.
        self._window = self._window[self._emitted :]
        self._emitted = len(self._window)
        return text

    def finish(self) -> str:
        """The rest of the text; nothing may be pushed after it."""
        return self._new_text()

    def _new_text(self) -> str:
        emitted = self._tokenizer.decode(self._window[: self._emitted])
        return self._tokenizer.decode(self._window)[len(emitted) :]


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object; a missing file is an empty one."""
    try:
        return dict(json.loads(path.read_bytes())) if path.is_file() else {}
    except (OSError, ValueError, TypeError) as error:
        raise BaseUnusable(f"{path} can't be read: {error}. Copy the folder again.") from error


def _token_text(token: object) -> str | None:
    """A special token of tokenizer_config.json, which is a string or an object with its `content`."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _as_ids(value: int | Sequence[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)
