"""Chat templates in Hugging Face's dialect of Jinja: finds and renders them, and detects what they support.

A template comes with the base and runs in Jinja's sandbox. Loops, calls and sizes are bounded, so that a template that
never ends is an error and does not block a replica.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from loramill.errors import BaseUnusable, InvalidRequest

#: Maximum iterations and calls per rendering. A million messages do not fit any context; a million steps take a second.
MAX_STEPS = 2_000_000
#: Maximum characters of a rendering and of any intermediate text.
MAX_CHARACTERS = 1 << 25

_BUDGET = "loramill_budget"
_NON_ASCII = re.compile(r"[^\x00-\x7f]")


class _RefusedError(Exception):
    """A template raised an error, by `raise_exception` or by a fault of its own; the text is its message."""


def read_templates(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """The chat templates of a Hugging Face folder by name, as transformers finds them.

    `chat_template.jinja` and `additional_chat_templates/*.jinja` come before `chat_template` in tokenizer_config.json
    (a text, or a list of named ones), and that before chat_template.json.

    Args:
        folder: the base's folder.
        settings: the content of tokenizer_config.json.

    Raises:
        BaseUnusable: a file can't be read, or does not contain a template.
    """
    files = {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if (default := folder / "chat_template.jinja").is_file():
        files["default"] = default
    try:
        if files:
            return {name: path.read_text(encoding="utf-8") for name, path in files.items()}
        if settings.get("chat_template"):
            return templates_by_name(settings["chat_template"])
        legacy = folder / "chat_template.json"
        return templates_by_name(json.loads(legacy.read_bytes())["chat_template"]) if legacy.is_file() else {}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise BaseUnusable(f"the chat template can't be read: {error!r}. Copy the folder again.") from error


def templates_by_name(value: object) -> dict[str, str]:
    """The `chat_template` of a JSON file as templates by name.

    Raises:
        TypeError, KeyError: it is not a chat template.
    """
    if isinstance(value, list):
        value = {entry["name"]: entry["template"] for entry in value}
    named = value if isinstance(value, dict) else {"default": value} if value else {}
    templates = {name: template for name, template in named.items() if isinstance(template, str)}
    if len(templates) < len(named):
        raise TypeError("a chat template is a text")
    return templates


@dataclass(frozen=True, slots=True)
class TemplateSupport:
    """What a template supports, detected by rendering marker words.

    Attributes:
        refusal: why the template can't render any conversation.
        parts: roles whose content must be a list of parts, since the template drops plain text.
        dropped: roles whose text the template drops in either form.
        developer: whether the template has the role "developer".
        tools: whether it renders tools.
        tool_calls: whether it renders tool calls of the assistant and their results.
        json_arguments: whether the arguments of a call must be JSON text; other templates take an object.
        rendered_tool: a tool as the template renders it.
    """

    refusal: str | None = None
    parts: frozenset[str] = frozenset()
    dropped: frozenset[str] = frozenset()
    developer: bool = False
    tools: bool = False
    tool_calls: bool = False
    json_arguments: bool = False
    rendered_tool: str = ""


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
            tools: tools for the assistant; the template gets None if there are none.
            now: the time for `strftime_now`; None: the current time, in UTC.

        Raises:
            InvalidRequest: the template raises, exceeds its steps or characters, or drops a role's text.
        """
        findings = self.support
        for index, message in enumerate(messages):
            if message["role"] in findings.dropped:
                raise InvalidRequest(
                    f"This base's chat template drops {message['role']} messages: write the text into a user message.",
                    param=f"messages[{index}].role",
                )
        try:
            return self._render(
                [_adapt_message(message, findings) for message in messages], add_generation_prompt, tools, now
            )
        except _RefusedError as error:
            raise InvalidRequest(f"The base's chat template refuses this: {error}", param="messages") from error

    @cached_property
    def support(self) -> TemplateSupport:
        """What the template supports."""
        return _detect_support(self)

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] = (),
        now: datetime | None = None,
    ) -> str:
        moment = now or datetime.now(UTC)
        template = self._tool_use if tools else self._default
        budget = _Budget(MAX_STEPS, MAX_CHARACTERS)
        variables = {
            **self._tokens,
            "messages": list(messages),
            "tools": list(tools) or None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            "strftime_now": moment.strftime,
            _BUDGET: budget,
        }
        pieces: list[str] = []
        try:
            for piece in template.generate(variables):
                budget.use_characters(len(piece))
                pieces.append(piece)
        except Exception as error:  # a template may divide by zero or recurse, as any program
            own = isinstance(error, jinja2.TemplateError)
            raise _RefusedError(str(error) if own else f"{type(error).__name__}: {error}") from error
        return "".join(pieces)


def _adapt_message(message: Mapping[str, Any], findings: TemplateSupport) -> dict[str, Any]:
    """A message in the form that the template takes."""
    made = dict(message)
    if made["role"] == "developer" and not findings.developer:
        made["role"] = "system"
    if made["role"] in findings.parts:
        made["content"] = [{"type": "text", "text": made["content"]}]
    if findings.json_arguments and made.get("tool_calls"):
        made["tool_calls"] = [_with_json_arguments(call) for call in made["tool_calls"]]
    return made


def _with_json_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    arguments = _tojson(call["function"]["arguments"])
    return {**call, "function": {**call["function"], "arguments": arguments}}


# Detection of what a template supports: renders marker words and looks for them in the text

_MARKER, _NAME, _KEY = "qwordq", "qnameq", "qkeyq"
_TOOL = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "",
        "parameters": {"type": "object", "properties": {_KEY: {"type": "string"}}, "required": [_KEY]},
    },
}


def _detect_support(template: ChatTemplate) -> TemplateSupport:
    """Renders a marker as each role, as text and as a part, and looks for it in the result.

    A role that the template refuses, such as "system" in Gemma's, is neither dropped nor in parts: a request with such
    a message gets the template's error.
    """
    refusal, users = _refusal_reason(template), _content_form(template, "user")
    if users is None and refusal:
        return TemplateSupport(refusal=refusal)
    forms = {"user": users, **{role: _content_form(template, role, users) for role in ("assistant", "system")}}
    developer = "developer" in template.source and _content_form(template, "developer", users) == "text"
    parts = frozenset(role for role, form in forms.items() if form == "parts")
    found = TemplateSupport(
        parts=parts | ({"tool"} if "assistant" in parts and "user" in parts else frozenset()),
        dropped=frozenset(role for role, form in forms.items() if form == "dropped"),
        developer=developer,
    )
    return _detect_tool_support(template, found)


def _refusal_reason(template: ChatTemplate) -> str | None:
    """Why a user's message can be rendered neither alone nor after a system message; None if it can."""
    user, system = _message("user", _MARKER), _message("system", _MARKER)
    reason = None
    for messages in ([user], [system, user]):
        try:
            template._render(messages, add_generation_prompt=True)
            return None
        except _RefusedError as error:
            reason = reason or str(error)
    return reason


def _content_form(template: ChatTemplate, role: str, users: str | None = "text") -> str | None:
    """How a role's content is read: as "text" or "parts", or "dropped"; None: the template refuses such a message."""
    seen = None
    for form in ("text", "parts"):
        other = _message("user", "Hi", "parts" if users == "parts" else "text")
        mine = _message(role, _MARKER, form)
        conversation = {"user": [mine], "assistant": [other, mine, other]}.get(role, [mine, other])
        try:
            text = template._render(conversation, add_generation_prompt=True)
        except _RefusedError:
            continue
        if _MARKER in text.lower():
            return form
        seen = "dropped"
    return seen


def _message(role: str, text: str, form: str = "text") -> dict[str, Any]:
    return {"role": role, "content": text if form == "text" else [{"type": "text", "text": text}]}


def _detect_tool_support(template: ChatTemplate, found: TemplateSupport) -> TemplateSupport:
    user = _adapt_message(_message("user", "Hi"), found)
    try:
        rendered = template._render([user], add_generation_prompt=True, tools=[_TOOL])
    except _RefusedError:
        rendered = ""
    calls, json_arguments = False, False
    for as_json in (False, True):
        form = TemplateSupport(parts=found.parts, json_arguments=as_json)
        text = _render_tool_call(template, [_adapt_message(message, form) for message in _TOOL_CALL_CONVERSATION])
        if _NAME in text and _MARKER in text and f"'{_KEY}': " not in text and "qresultq" in text:
            calls, json_arguments = True, as_json
            break
    return replace(
        found, tools=_NAME in rendered, tool_calls=calls, json_arguments=json_arguments, rendered_tool=rendered
    )


#: Mistral's templates accept only ids of nine letters and digits.
_TOOL_CALL_CONVERSATION: tuple[dict[str, Any], ...] = (
    {"role": "user", "content": "Hi"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"id": "abcdefghi", "type": "function", "function": {"name": _NAME, "arguments": {_KEY: _MARKER}}}
        ],
    },
    {"role": "tool", "content": "qresultq", "tool_call_id": "abcdefghi", "name": _NAME},
)


def _render_tool_call(template: ChatTemplate, messages: Sequence[Mapping[str, Any]]) -> str:
    try:
        return template._render(messages, add_generation_prompt=True, tools=[_TOOL])
    except _RefusedError:
        return ""


# The dialect


@dataclass(slots=True)
class _Budget:
    """The steps and characters that a rendering has left."""

    steps: int
    left: int

    def use_step(self) -> None:
        self.steps -= 1
        if self.steps < 0:
            raise jinja2.TemplateError(f"it takes more than {MAX_STEPS} steps")

    def use_characters(self, count: int) -> None:
        self.left -= count
        if self.left < 0:
            raise jinja2.TemplateError(f"it writes more than {MAX_CHARACTERS} characters")


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, with bounds on calls and on the operators that make long texts from short ones."""

    intercepted_binops = frozenset({"*", "**", "+"})

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 - as overridden
        __context.resolve(_BUDGET).use_step()
        if isinstance(getattr(__obj, "__self__", None), str):
            for number in (*args, *kwargs.values()):
                if isinstance(number, int):
                    _check_size(number)
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        context.resolve(_BUDGET).use_step()
        if operator == "**":
            _check_size(abs(right) * 64)
        elif operator == "*":
            for sequence, times in ((left, right), (right, left)):
                if isinstance(sequence, str | list | tuple) and isinstance(times, int):
                    _check_size(len(sequence) * times)
        elif isinstance(left, str) and isinstance(right, str):
            _check_size(len(left) + len(right))
        return super().call_binop(context, operator, left, right)


def _check_size(size: int) -> None:
    if size > MAX_CHARACTERS:
        raise jinja2.TemplateError(f"it makes a text of more than {MAX_CHARACTERS} characters")


class _BoundLoopsAndJoins(NodeTransformer):
    """Passes the values of each loop, and each joined text, through a filter that counts them."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802 - by the node's name
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, "loramill_steps", [], [], None, None).set_lineno(node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802 - by the node's name
        self.generic_visit(node)
        pieces = nodes.List(node.nodes).set_lineno(node.lineno)
        return nodes.Filter(pieces, "loramill_joined", [], [], None, None).set_lineno(node.lineno)


@jinja2.pass_context
def _steps(context: Context, values: Iterable[Any]) -> Iterator[Any]:
    budget = context.resolve(_BUDGET)
    for value in values:
        budget.use_step()
        yield value


def _joined(pieces: Sequence[Any]) -> str:
    texts = [str(piece) for piece in pieces]
    _check_size(sum(map(len, texts)))
    return "".join(texts)


class _GenerationBlock(Extension):
    """Accepts `{% generation %}` blocks; answers are found without them."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's way to declare it

    def parse(self, parser: jinja2.parser.Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def compile_template(template: str) -> jinja2.Template:
    """Compiles a template in Hugging Face's dialect.

    Raises:
        BaseUnusable: its syntax has an error.
    """
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols])
    environment.filters |= {"tojson": _tojson, "loramill_steps": _steps, "loramill_joined": _joined}
    environment.globals["raise_exception"] = _raise_in_template
    try:
        return environment.from_string(_BoundLoopsAndJoins().visit(environment.parse(template)))
    except jinja2.TemplateError as error:
        raise BaseUnusable(f"the chat template has an error: {error}") from error


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """`tojson` as in transformers; Jinja's own escapes HTML."""
    text = json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
    # json would also escape the lone surrogates that mark special tokens; these must stay.
    return _NON_ASCII.sub(_escaped, text) if ensure_ascii else text


def _escaped(match: re.Match[str]) -> str:
    character = match[0]
    return character if "\ud800" <= character <= "\udfff" else json.dumps(character)[1:-1]


def _raise_in_template(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
