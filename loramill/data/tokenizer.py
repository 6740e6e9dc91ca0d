"""Text to tokens and back: the one place that renders chat, for training and for serving alike.

Works on the files of a Hugging Face folder with `tokenizers` and `jinja2` alone, so that a gateway needs no torch.

What users write is never markup: a special token spelled in a message (`<|im_end|>`) is encoded as the plain
characters it is made of. Only the chat template itself can open or close a role.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

from tokenizers import Tokenizer

from loramill.data.chat_template import ChatTemplate, read_templates, templates_by_name
from loramill.data.token_bytes import TokenBytes
from loramill.errors import BaseUnusable, DatasetInvalid, InvalidRequest, UnsupportedParameter

if TYPE_CHECKING:
    from loramill.data.examples import Example
    from loramill.types import TrainOn

ROLES = ("system", "user", "assistant")

#: All roles that a template may get; "developer" becomes "system" if the template does not have that role.
_TEMPLATE_ROLES = (*ROLES, "developer", "tool")

#: How a model calls a tool, as Hermes and Qwen have it: JSON with `name` and `arguments` between these.
CALL_BEGIN, CALL_END = "<tool_call>", "</tool_call>"

#: Placeholder for an answer's content, to find its position in a rendered conversation.
_PLACEHOLDER = "loramill-places-the-answer-here"

#: Put before a special token that a user spelled. No text can hold it already: a lone surrogate isn't UTF-8.
_ESCAPE = "\ud800"


class FunctionCall(TypedDict):
    """A function that was called; unlike on OpenAI's wire, `arguments` is the object, as templates expect it."""

    name: str
    arguments: dict[str, Any]


class TemplateToolCall(TypedDict):
    """A call of a tool by the assistant; `type` is "function"."""

    id: str
    type: str
    function: FunctionCall


class Message(TypedDict):
    """One turn of a conversation; `role` is one of `ROLES`, "developer", or "tool" for what a call of `tool_call_id`
    returned. `name` tells participants of one role apart; most templates ignore it."""

    role: str
    content: str
    name: NotRequired[str]
    tool_calls: NotRequired[list[TemplateToolCall]]
    tool_call_id: NotRequired[str]


@dataclass(frozen=True, slots=True)
class TokenSpan:
    """An answer within an example: the loss lies on its tokens from `start` to before `stop`, times `weight`."""

    start: int
    stop: int
    weight: float


@dataclass(frozen=True, slots=True)
class EncodedExample:
    """A training example, up to the end of the last answer that is learnt.

    Attributes:
        tokens: all of it; what is before an answer is exactly the prompt that will be served, and each answer that is
            learnt ends with the stop token.
        prompt_length: tokens before the last answer.
        weight: of the last answer's loss, above 0.
        earlier: the answers before that are learnt, too.
        line: where it stands in its file, from 1; 0: in none.
        rest: further sequences, for answers whose prompt in serving does not begin with these tokens: some templates
            remove the reasoning from past answers.
    """

    tokens: tuple[int, ...]
    prompt_length: int
    weight: float = 1.0
    earlier: tuple[TokenSpan, ...] = ()
    line: int = 0
    rest: tuple[EncodedExample, ...] = ()

    @property
    def sequences(self) -> tuple[EncodedExample, ...]:
        """This sequence and the rest."""
        return (self, *self.rest)

    @property
    def spans(self) -> tuple[TokenSpan, ...]:
        """All answers that are trained in these tokens, in order."""
        return (*self.earlier, TokenSpan(self.prompt_length, len(self.tokens), self.weight))


class ChatTokenizer:
    """A base's tokenizer and chat template.

    Attributes:
        stop_ids: ids that end an answer; the first is the one that training teaches.
        pad_id: id for padding, never the one that training teaches as the end.
        vocabulary: number of ids.
    """

    def __init__(self, tokenizer: str, settings: Mapping[str, Any], generation: Mapping[str, Any]) -> None:
        """Builds from the text of tokenizer.json, tokenizer_config.json with the template, and the generation ids."""
        self._markup = Tokenizer.from_str(tokenizer)
        self._plain = Tokenizer.from_str(tokenizer)
        self._plain.encode_special_tokens = True
        added = self._markup.get_added_tokens_decoder()
        self._special = {token.content: id_ for id_, token in added.items() if token.special}
        either = "|".join(re.escape(text) for text in sorted(self._special, key=len, reverse=True)) or r"(?!)"
        self._spelled = re.compile(f"(?={either})")
        self._unmarked = re.compile(f"(?<!{_ESCAPE})({either})")

        self._names = {name: _content(settings.get(f"{name}_token")) for name in ("bos", "eos", "pad", "unk")}
        named = {name: self._markup.token_to_id(text) for name, text in self._names.items() if text}
        self.stop_ids = _ids(generation.get("eos_token_id")) or _ids(named.get("eos"))
        if not self.stop_ids:
            raise BaseUnusable("The base names no end token; set eos_token_id in generation_config.json.")
        pads = (*_ids(generation.get("pad_token_id")), *_ids(named.get("pad")), *self._special.values(), 0)
        self.pad_id = next((id_ for id_ in pads if id_ != self.stop_ids[0]), 1)
        self.vocabulary_size: int = self._markup.get_vocab_size()

        templates = templates_by_name(settings.get("chat_template"))
        tokens = {f"{name}_token": text for name, text in self._names.items() if text is not None}
        self._template = ChatTemplate(templates, tokens) if "default" in templates else None
        self._pinned_time: datetime | None = None
        begins = settings.get("add_bos_token", named.get("bos") in self._markup.encode("").ids)
        self._prefix = _ids(named.get("bos")) if begins else ()

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

    def encode_chat(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """Tokens of a conversation up to where the assistant's answer begins.

        Args:
            messages: the conversation.
            tools: what the assistant may call, each `{"type": "function", "function": {"name": …, …}}`.

        Raises:
            InvalidRequest: no messages, an unknown role, text that isn't Unicode, or the template refuses.
            UnsupportedParameter: the template knows no tools, and there are some, or calls or results of them.
        """
        if (param := _first_tool_param(messages, tools)) and not self.supports_tool_calls:
            raise UnsupportedParameter(
                f"This base's chat template knows no tools, or not in a form that is understood here: leave '{param}' "
                f"out, or use a base whose template has tools called by {CALL_BEGIN}.",
                param=param,
            )
        return self._encode(self._render(messages, add_generation_prompt=True, tools=tools))

    @cached_property
    def supports_tool_calls(self) -> bool:
        """Whether the chat template writes tools and their results, and has the model call them by `CALL_BEGIN`."""
        found = self._template.support if self._template else None
        # Of a special token nothing would be left in the answer's text.
        return (
            found is not None
            and found.tools
            and found.tool_calls
            and CALL_BEGIN in found.rendered_tool
            and not self._special.keys() & {CALL_BEGIN, CALL_END}
        )

    @property
    def renders_tool_calls(self) -> bool:
        """Whether the chat template renders tools, calls and their results, in some form: these can be trained."""
        return self._template is not None and self._template.support.tools and self._template.support.tool_calls

    @cached_property
    def chat_problem(self) -> str | None:
        """Why this base can't chat, as the end of a sentence; None if it can."""
        if self._template is None:
            return "it has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json)"
        refusal = self._template.support.refusal
        return None if refusal is None else f"its chat template refuses every conversation: {refusal}"

    @cached_property
    def training_problem(self) -> str | None:
        """Why this base can't train on conversations, as the end of a sentence; None if it can."""
        if self.chat_problem:
            return self.chat_problem
        try:
            self._encode_answer([Message(role="user", content="Hi"), Message(role="assistant", content="Hello.")])
        except InvalidRequest as error:
            return error.message
        return None

    @property
    def limitations(self) -> tuple[str, ...]:
        """What the base can't do because of its chat template, one sentence each; empty for most bases."""
        if self.chat_problem:
            return (f"This base serves completions only, not chat: {self.chat_problem}.",)
        if self.training_problem:
            return (f"This base trains on prompts and completions only, not on conversations: {self.training_problem}",)
        return ()

    def at_time(self, moment: datetime) -> ChatTokenizer:
        """A copy whose template gets `moment` as the current time, so that it always renders the same."""
        pinned = copy.copy(self)
        pinned._pinned_time = moment
        return pinned

    def encode_text(self, text: str) -> list[int]:
        """Tokens of a plain completion's prompt; only what the model itself demands (bos) is added.

        Raises:
            InvalidRequest: the text isn't Unicode.
        """
        return [*self._prefix, *self._encode_plain(_checked_unicode(text, "prompt"))]

    def encode_example(self, example: Example, train_on: TrainOn = "all") -> EncodedExample:
        """Tokens of a training example; every answer follows exactly the prompt that will be served.

        Args:
            learn: which answers of a conversation.

        Raises:
            DatasetInvalid: no answer is left to train; there are tools, which the chat template does not render; or it
                renders earlier messages differently once the answer is there, or does not end an answer with a stop
                token, so that no prefix is the prompt that will be served.
        """
        if example.prompt is not None:
            prompt = self.encode_text(example.prompt)
            whole = self.encode_text(example.prompt + example.completion)
            completion = self._continue(prompt, whole, self._spelled.sub(_ESCAPE, example.completion))
            weight = 1.0 if example.weights is None else example.weights[0]
            return EncodedExample((*prompt, *completion, self.stop_ids[0]), len(prompt), weight, line=example.line)
        if (param := _first_tool_param(example.messages, example.tools)) and not self.renders_tool_calls:
            raise DatasetInvalid(
                f"This base's chat template does not render tools or tool calls, so that '{param}' would be "
                "lost: leave them out, or use a base whose template supports tools."
            )
        found: list[EncodedExample] = []
        for index, weight in example.supervised_answers(train_on):
            prompt, completion = self._encode_answer(example.messages[: index + 1], example.tools)
            tokens = (*prompt, *completion)
            earlier: tuple[TokenSpan, ...] = ()
            if found and tuple(prompt[: len(found[-1].tokens)]) == found[-1].tokens:
                earlier = found.pop().spans
            found.append(EncodedExample(tokens, len(prompt), weight, earlier, example.line))
        if not found:
            raise DatasetInvalid(
                f"messages[{len(example.messages) - 1}].weight is 0, and only the last answer is to be trained: "
                "give it another weight, or train all answers."
            )
        return replace(found[0], rest=tuple(found[1:]))

    def _encode_answer(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()
    ) -> tuple[list[int], list[int]]:
        """Tokens of the prompt of the last message, which is an answer, and of the answer with its end."""
        answered = self._render(messages, add_generation_prompt=False, tools=tools)
        before = messages[:-1]
        prompt_text = (
            self._render(before, add_generation_prompt=True, tools=tools) if before else self._opening(answered)
        )
        if not answered.startswith(prompt_text):
            answered = prompt_text + self._answer_after_opening(messages, tools, prompt_text, answered)
        prompt = self._encode(prompt_text)
        completion = self._continue(prompt, self._encode(answered), answered[len(prompt_text) :])
        end = next((index for index, token in enumerate(completion) if token in self.stop_ids), None)
        if end is None:
            raise DatasetInvalid(
                "This base's chat template ends an answer with none of its stop tokens, so a "
                "model would never learn to stop; correct eos_token_id in the base's generation_config.json."
            )
        return prompt, completion[: end + 1]

    def _opening(self, answered: str) -> str:
        """The text before an answer that begins the conversation, for which no prompt can be rendered."""
        one = [Message(role="user", content="Hi")]
        opening = self._render(one, add_generation_prompt=True).removeprefix(
            self._render(one, add_generation_prompt=False)
        )
        before, found, _ = answered.partition(opening) if opening else ("", "", "")
        if not found:
            raise DatasetInvalid(
                "messages[0] is the assistant's, and this base's chat template does not show where such an "
                "answer begins: give it the weight 0, or put a message before it."
            )
        return before + found

    def _answer_after_opening(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], prompt_text: str, answered: str
    ) -> str:
        """The text after a generation prompt that already begins the answer, such as one that ends in `<think>`.

        Such templates render past answers without that opening, and often without their reasoning. In serving, the
        prompt is followed by the answer's content as the example has it, without the opening if it repeats it; so that
        is trained.
        """
        answer = messages[-1]
        placed = self._render(
            [*messages[:-1], {**answer, "content": _PLACEHOLDER}], add_generation_prompt=False, tools=tools
        )
        lead, found, tail = placed.partition(_PLACEHOLDER)
        if not found or not prompt_text.startswith(lead):
            raise DatasetInvalid(
                "This base's chat template writes the messages before an answer differently once "
                "the answer is there; use prompt/completion examples, or a base with another template."
            )
        if not answer["content"] and answered.startswith(lead):
            return answered[len(lead) :]
        return self._spelled.sub(_ESCAPE, _without_opening(answer["content"], prompt_text[len(lead) :])) + tail

    @property
    def tokenizer_json(self) -> str:
        """The text of a tokenizer.json that makes the same tokens."""
        text: str = self._markup.to_str()
        return text

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, without special tokens; bytes that are no UTF-8 become U+FFFD."""
        text: str = self._markup.decode(list(tokens), skip_special_tokens=True)
        return text

    @cached_property
    def token_bytes(self) -> TokenBytes:
        """The bytes that each token adds to a text."""
        return TokenBytes(self._markup, frozenset(self._special.values()))

    def decode_with_special_tokens(self, tokens: Sequence[int]) -> str:
        """The text of tokens with the special tokens in it, as the chat template wrote it."""
        text: str = self._markup.decode(list(tokens), skip_special_tokens=False)
        return text

    def _continue(self, prompt: list[int], whole: list[int], rest: str) -> list[int]:
        """Tokens of `rest` after `prompt`.

        Encoded in one go where the tokenizer keeps the boundary (some write a word's first piece differently at
        the beginning of a text), and by itself where it would merge across it.
        """
        if whole[: len(prompt)] == prompt:
            return whole[len(prompt) :]
        return self._encode(rest)

    def _render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool, tools: Sequence[Mapping[str, Any]] = ()
    ) -> str:
        """The template's text, with a mark before each special token that a message or a tool spells.

        Every conversation becomes text here: serving renders it with `answer`, and training compares that with the
        conversation that has the answer.

        Args:
            messages: the conversation.
            answer: whether the generation prompt follows, after which the assistant answers.
            tools: what the assistant may call.

        Raises:
            InvalidRequest: no template, no messages, an unknown role, invalid Unicode, or the template refuses.
        """
        if self._template is None:
            raise InvalidRequest("This base has no chat template; use plain completions.", param="messages")
        if not messages:
            raise InvalidRequest("messages is empty; send at least one.", param="messages")
        marked = []
        for index, message in enumerate(messages):
            where = f"messages[{index}]"
            if message["role"] not in _TEMPLATE_ROLES:
                raise InvalidRequest(
                    f"{where}.role must be one of {', '.join(_TEMPLATE_ROLES)}.", param=f"{where}.role"
                )
            _checked_unicode(message["content"], f"{where}.content")
            marked.append({key: self._marked(value, f"{where}.{key}") for key, value in message.items()})
        return self._template.render(
            marked,
            add_generation_prompt=add_generation_prompt,
            tools=self._marked(list(tools), "tools"),
            now=self._pinned_time,
        )

    def _marked(self, value: Any, param: str) -> Any:
        """JSON, with a mark before each special token that a text in it spells."""
        if isinstance(value, str):
            return self._spelled.sub(_ESCAPE, _checked_unicode(value, param))
        if isinstance(value, Mapping):
            return {self._marked(key, param): self._marked(item, param) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._marked(item, param) for item in value]
        return value

    def _encode(self, text: str) -> list[int]:
        """Tokens of rendered text; special tokens are themselves, except the marked ones."""
        if _ESCAPE not in text:
            ids: list[int] = self._markup.encode(text, add_special_tokens=False).ids
            return ids
        tokens: list[int] = []
        for index, piece in enumerate(self._unmarked.split(text)):
            tokens += [self._special[piece]] if index % 2 else self._encode_plain(piece.replace(_ESCAPE, ""))
        return tokens

    def _encode_plain(self, text: str) -> list[int]:
        ids: list[int] = self._plain.encode(text, add_special_tokens=False).ids
        return ids


class IncrementalDecoder:
    """Turns an answer's tokens into text as they come.

    What `push` and `finish` return, joined, is `decode` of all tokens; no piece ends within a character.
    """

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._emitted = 0

    def push(self, tokens: Sequence[int]) -> str:
        """The text that these tokens complete, which may be none."""
        self._window += tokens
        text = self._new_text()
        if not text or text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        # The tokens just told stay as context: some tokenizers write a word's space only after another word.
        self._window = self._window[self._emitted :]
        self._emitted = len(self._window)
        return text

    def finish(self) -> str:
        """What was held back; nothing may be pushed after it."""
        return self._new_text()

    def _new_text(self) -> str:
        told = self._tokenizer.decode(self._window[: self._emitted])
        return self._tokenizer.decode(self._window)[len(told) :]


def _without_opening(content: str, opening: str) -> str:
    """The content without the opening of the generation prompt, if it begins with it; white space is ignored."""
    begins, space = opening.strip(), opening[len(opening.rstrip()) :]
    if not begins or not content.lstrip().startswith(begins):
        return content
    return content.lstrip()[len(begins) :].removeprefix(space)


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object; an absent file is an empty one."""
    try:
        return dict(json.loads(path.read_bytes())) if path.is_file() else {}
    except (OSError, ValueError, TypeError) as error:
        raise BaseUnusable(f"{path} can't be read: {error}. Copy the folder again.") from error


def _content(token: object) -> str | None:
    """A special token of tokenizer_config.json, which is a string or an object with its `content`."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _ids(value: int | Sequence[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)


def _first_tool_param(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> str | None:
    """The first parameter that is about tools."""
    if tools:
        return "tools"
    for index, message in enumerate(messages):
        if message["role"] == "tool":
            return f"messages[{index}].role"
        if message.get("tool_calls"):
            return f"messages[{index}].tool_calls"
    return None


def _checked_unicode(text: object, param: str) -> str:
    """`text` if it is a string that UTF-8 can hold."""
    if not isinstance(text, str):
        raise InvalidRequest(f"{param} must be a string.", param=param)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"{param} holds half a surrogate pair, which is no character.", param=param) from error
    return text
