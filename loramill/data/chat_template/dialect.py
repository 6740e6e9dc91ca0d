"""Hugging Face's dialect of Jinja in Jinja's sandbox.

A template comes with the base. Loops, calls and sizes are bounded, so that a template that never ends is an error and
does not block a replica.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from loramill.errors import BaseUnusable

#: Maximum iterations and calls per rendering. A million messages do not fit any context; a million steps take a second.
MAX_STEPS = 2_000_000
#: Maximum characters of a rendering and of any intermediate text.
MAX_CHARACTERS = 1 << 25

_BUDGET = "loramill_budget"
_NON_ASCII = re.compile(r"[^\x00-\x7f]")


class TemplateRefusedError(Exception):
    """A template raised an error, by `raise_exception` or by a fault of its own; the text is its message."""


def compile_template(template: str) -> jinja2.Template:
    """Compiles a template in Hugging Face's dialect.

    Raises:
        BaseUnusable: its syntax has an error.
    """
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols])
    environment.filters |= {"tojson": tojson, "loramill_steps": _steps, "loramill_joined": _joined}
    environment.globals["raise_exception"] = _raise_in_template
    try:
        compiled = environment.from_string(_BoundLoopsAndJoins().visit(environment.parse(template)))
    except jinja2.TemplateError as error:
        raise BaseUnusable(f"the chat template has an error: {error}") from error
    # Jinja's ChainMap is copied at each rendering, which took a quarter of a short conversation's time.
    compiled.globals = dict(compiled.globals)
    return compiled


def render_template(template: jinja2.Template, variables: Mapping[str, Any]) -> str:
    """The text of a compiled template with some variables.

    Raises:
        TemplateRefusedError: it raises, or exceeds its steps or characters.
    """
    budget = _Budget(MAX_STEPS, MAX_CHARACTERS)
    pieces: list[str] = []
    try:
        for piece in template.generate({**variables, _BUDGET: budget}):
            budget.use_characters(len(piece))
            pieces.append(piece)
    except Exception as error:  # a template may divide by zero or recurse, as any program
        own = isinstance(error, jinja2.TemplateError)
        raise TemplateRefusedError(str(error) if own else f"{type(error).__name__}: {error}") from error
    return "".join(pieces)


def tojson(
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


def _raise_in_template(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
