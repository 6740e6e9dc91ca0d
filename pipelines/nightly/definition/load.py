"""Reads nightly.yaml; every fault is reported at once, with its line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from loramill.errors import DefinitionInvalid
from loramill.pipelines.nightly.definition.schema import DefinitionFault, NightlyDefinition
from loramill.pipelines.nightly.definition.training import ScheduleDefinition
from loramill.pipelines.nightly.definition.yaml_text import YamlFault, YamlText, read_yaml
from loramill.plural import counted
from loramill.settings import Settings

#: Texts for pydantic's types of errors, where its own are about Python.
_WORDS = {
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "dict_type": "must contain keys with values",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "int_from_float": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_parsing_size": "has too many digits",
    "int_type": "must be a whole number",
    "model_attributes_type": "must contain keys with values",
    "model_type": "must contain keys with values",
    "string_too_short": "may not be empty",
    "string_type": "must be text",
    "tuple_type": "must be a list",
}

#: Without a file, nightly runs start by command alone.
NO_FILE = NightlyDefinition(schedule=ScheduleDefinition(enabled=False))


def load_definition(settings: Settings) -> NightlyDefinition:
    """Returns the definition of the file that the settings name, or `NO_FILE`.

    Raises:
        DefinitionInvalid: the file has faults, or `nightly.file` names one that does not exist.
    """
    if settings.nightly.file is None and not settings.nightly_file.exists():
        return NO_FILE
    return read_definition(settings.nightly_file)


def read_definition(path: Path) -> NightlyDefinition:
    """Reads a file.

    Raises:
        DefinitionInvalid: it does not exist, can't be read, or has faults; `problems` has one line for each.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise DefinitionInvalid(f"{path} does not exist; create it, or correct the setting nightly.file.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DefinitionInvalid(f"{path} can't be read: {error}.") from error
    return parse_definition(text, path)


def parse_definition(text: str, path: Path) -> NightlyDefinition:
    """Reads the text of a file; `path` is its name in messages, and relative paths are relative to its folder.

    Raises:
        DefinitionInvalid: it has faults; `problems` has one line for each.
    """
    try:
        read = read_yaml(text)
    except YamlFault as fault:
        raise _invalid(path, [f"{path.name}:{fault.line}: {fault.reason}."]) from fault
    if read.value is not None and not isinstance(read.value, dict):
        raise _invalid(path, [f"{path.name}:1: the file must contain keys with values, such as `split:`."])
    try:
        return NightlyDefinition.model_validate(read.value or {}, context={"folder": path.absolute().parent})
    except ValidationError as error:
        raise _invalid(path, _problems(path, read, error)) from error


def _invalid(path: Path, problems: Sequence[str]) -> DefinitionInvalid:
    message = "\n".join([f"{path} has {counted(len(problems), 'fault')}:", *problems])
    return DefinitionInvalid(message, problems=problems)


def _problems(path: Path, read: YamlText, error: ValidationError) -> list[str]:
    """One sentence for each faulty place, in the order of the lines."""
    found: dict[tuple[int, str], list[str]] = {}
    for line, where, reason in _faults(read, error, ()):
        found.setdefault((line, f"{path.name}:{line}: {where}"), []).append(reason)
    return [f"{where}{_joined(reasons)}" for (_, where), reasons in sorted(found.items())]


def _faults(read: YamlText, error: ValidationError, above: tuple[str | int, ...]) -> Iterator[tuple[int, str, str]]:
    """The line, the place and the reason of each fault; the place begins the sentence that the reason ends.

    Args:
        read: the text.
        error: the faults of a section.
        above: where the section is.
    """
    for each in error.errors():
        cause, location = each.get("ctx", {}).get("error"), (*above, *each["loc"])
        if isinstance(cause, ValidationError):
            yield from _faults(read, cause, location)
        elif isinstance(cause, DefinitionFault):
            for fault in cause.found:
                line, names = _first_located(read, fault.keys)
                override = f"{'.'.join(names[:2])}: " if names[:1] == ("overrides",) else ""
                yield line, override, f"{fault.reason}."
        else:
            line, names = read.locate(location)
            yield line, ".".join(names) or "the file", _reason(each, location, cause)


def _first_located(read: YamlText, keys: Sequence[tuple[str | int, ...]]) -> tuple[int, tuple[str, ...]]:
    """The place of the first key that the text has, or else of the section of the first one."""
    places = [(key, *read.locate(key)) for key in keys]
    return next(((line, names) for key, line, names in places if len(names) == len(key)), places[0][1:])


def _joined(reasons: Sequence[str]) -> str:
    """The reasons of one place; there are several where a value may have several types."""
    first, *others = dict.fromkeys(reasons)
    given = first.partition(";")[2]
    same = all(each.startswith(" must be ") and each.partition(";")[2] == given for each in (first, *others))
    if not others or not same:
        return first + "".join(f" It{each}" for each in others)
    kinds = [each.partition(";")[0].removesuffix(".").removeprefix(" must be ") for each in (first, *others)]
    return f" must be {' or '.join(kinds)}{f';{given}' if given else '.'}"


def _reason(error: Any, location: Sequence[str | int], cause: object) -> str:
    """What is wrong with a place in the file, as the rest of a sentence about it."""
    match error["type"]:
        case "extra_forbidden":
            return f" is not a key{_near(location)}"
        case "missing":
            return f" needs the key {location[-1]}."
        case "value_error":
            text = str(cause).removesuffix(".")
            return f"{'' if text.startswith(('must ', 'may ')) else ':'} {text}{_given(error)}."
        case kind:
            return f" {_WORDS.get(kind) or _in_words(error['msg'])}{_given(error)}."


def _in_words(message: str) -> str:
    return message.replace("Input should be", "must be", 1).replace("Input should", "must", 1)


def _given(error: Any) -> str:
    """The value, unless it is a section or a list."""
    value = error["input"]
    return "" if isinstance(value, dict | list | tuple | BaseModel) else f"; it is {_shown(value)}"


def _shown(value: object) -> str:
    words = {None: "null", True: "true", False: "false"}
    if value is None or isinstance(value, bool):
        return words[value]
    return f"'{value}'" if isinstance(value, str) else str(value)


def _near(location: Sequence[str | int]) -> str:
    """The key that was probably meant, or all keys of the section."""
    keys = _keys(NightlyDefinition, [part for part in location[:-1] if isinstance(part, str)])
    found = get_close_matches(str(location[-1]), keys, n=1)
    return f"; did you mean {found[0]}?" if found else f"; the keys are {', '.join(keys)}."


def _keys(model: type[BaseModel], names: Iterable[str]) -> list[str]:
    """The keys of a section, by the names above it."""
    for name in names:
        field = model.model_fields.get(name)
        if field is not None and (below := _model_in(field.annotation)) is not None:
            model = below
    return list(model.model_fields)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model in an annotation such as `tuple[Model, ...] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for each in get_args(annotation) if (found := _model_in(each)) is not None), None)
