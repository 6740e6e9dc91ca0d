"""YAML as values with the line of each, so that a message can name it.

Plain words are read as in YAML 1.2's core schema: `on`, `no` and `1:30` are text, as a reader of nightly.yaml expects.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import yaml

_WORDS: dict[str, Any] = {"": None, "~": None, "null": None, "true": True, "false": False}
_INTEGER = re.compile(r"[-+]?[0-9]+")
_NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
#: Depth of nightly.yaml is 5; an anchor inside itself has no end.
_MAX_DEPTH = 20
#: An override for each of 1000 adapters has 10,000 values; nine lines of aliases to aliases stand for 10^9, which fill
#: the memory of any machine.
_MAX_VALUES = 100_000
#: Python refuses to read integers of more than 4300 digits; longer ones than this stay text.
_MAX_DIGITS = 100


class YamlFault(Exception):
    """The text is not YAML that can be read, with the line of the fault."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(reason)
        self.line, self.reason = line, reason


@dataclass(frozen=True, slots=True)
class YamlText:
    """The values of a YAML text, and the nodes that they were read from."""

    value: Any
    _root: yaml.Node | None

    def locate(self, path: Sequence[Hashable]) -> tuple[int, tuple[str, ...]]:
        """Returns the line, and the part of the path that the text contains.

        Args:
            path: keys and indices; what follows the last one that exists is ignored.
        """
        node, line, names = self._root, 1, []
        for part in path:
            found = _child(node, part)
            if found is None:
                break
            line, node = found
            names.append(str(part + 1) if isinstance(part, int) else str(part))
        return line, tuple(names)


def read_yaml(text: str) -> YamlText:
    """Reads a YAML text.

    Raises:
        YamlFault: it is not YAML, has a key twice, is nested without end, or has more than `_MAX_VALUES` values.
    """
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise YamlFault(mark.line + 1 if mark else 1, _reason(error, text)) from error
    except yaml.YAMLError as error:
        raise YamlFault(1, str(error)) from error
    except RecursionError as error:  # 3000 brackets in a row
        raise YamlFault(1, "the values are nested too deeply") from error
    return YamlText(None if root is None else _value(root, 0, count(1)), root)


def _reason(error: yaml.MarkedYAMLError, text: str) -> str:
    mark = error.problem_mark
    line = text.split("\n")[mark.line].strip() if mark and mark.line < len(text.split("\n")) else ""
    if re.search(r":\s*\*", line):
        return f"{error.problem}; quote a text that begins with *"
    if "\t" in line or "'\\t'" in str(error.problem):
        return f"{error.problem}; indent with spaces, not with tabs"
    return str(error.problem or error)


def _value(node: yaml.Node, depth: int, number: Iterator[int]) -> Any:
    """The value of a node; `number` counts the values, and those of an alias each time it is used."""
    if next(number) > _MAX_VALUES:
        raise YamlFault(
            node.start_mark.line + 1, f"the file stands for more than {_MAX_VALUES} values, with its aliases"
        )
    if depth > _MAX_DEPTH:
        raise YamlFault(node.start_mark.line + 1, "the values are nested too deeply")
    if isinstance(node, yaml.MappingNode):
        values: dict[str, Any] = {}
        for key, each in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise YamlFault(line, "a key must be a word")
            if key.value in values:
                raise YamlFault(line, f"the key {key.value} is there twice")
            values[key.value] = _value(each, depth + 1, number)
        return values
    if isinstance(node, yaml.SequenceNode):
        return [_value(each, depth + 1, number) for each in node.value]
    return _scalar(node)


def _scalar(node: yaml.Node) -> Any:
    text = str(node.value)
    if node.style is not None:  # quoted
        return text
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if len(text) > _MAX_DIGITS:
        return text
    if _INTEGER.fullmatch(text):
        return int(text)
    return float(text) if _NUMBER.fullmatch(text) else text


def _child(node: yaml.Node | None, part: Hashable) -> tuple[int, yaml.Node] | None:
    """The line and the node of a key or an index."""
    if isinstance(node, yaml.MappingNode):
        found = next((pair for pair in node.value if pair[0].value == part), None)
        return None if found is None else (found[0].start_mark.line + 1, found[1])
    if isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
        return node.value[part].start_mark.line + 1, node.value[part]
    return None
