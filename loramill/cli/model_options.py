"""Command-line options for the fields of a model, whose descriptions are the help texts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo


def description_of(field: Any) -> str:
    """Returns the description of an annotated type."""
    return next(each.description or "" for each in get_args(field) if isinstance(each, FieldInfo))


def option_help(model: type[BaseModel], name: str) -> str:
    """Returns the help of a field's option: its description, and the words that it may be."""
    words = option_words(model, name)
    choices = f" Choices: {', '.join(words)}." if words else ""
    return f"{model.model_fields[name].description}{choices}"


def option_words(model: type[BaseModel], name: str) -> tuple[str, ...]:
    """Returns the words that a field may be; empty if it may be anything else."""
    kind = option_type(model, name)
    return get_args(kind) if get_origin(kind) is Literal else ()


def option_type(model: type[BaseModel], name: str) -> Any:
    """Returns the type of an option: its field's, or text where the value is more than one word or number."""
    annotation = model.model_fields[name].annotation
    words: list[str] = []
    for kind in get_args(annotation) or (annotation,):
        if kind in (int, float, bool):
            return kind
        if get_origin(kind) is Literal:
            words += get_args(kind)
        elif kind is not NoneType:
            return str
    return Literal[tuple(words)]


def replace_keywords(command: Callable[..., None], options: Iterable[tuple[str, Any]]) -> Callable[..., None]:
    """Gives a command named options, which default to None, in place of its `**options`.

    Args:
        command: the command; its other parameters come first.
        options: names of the options, and their types with a `typer.Option`.
    """
    signature = inspect.signature(command, eval_str=True)
    fixed = [each for each in signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        for name, annotation in options
    ]
    command.__signature__ = signature.replace(parameters=[*fixed, *added])  # type: ignore[attr-defined]
    return command
