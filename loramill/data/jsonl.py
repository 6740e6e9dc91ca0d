"""Reads JSONL line by line as strict JSON, which all readers interpret in the same way.

Only a line feed ends a line; U+2028, U+0085 and form feeds may be part of a text.
"""

from __future__ import annotations

import codecs
import io
import json
import math
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from loramill.errors import DatasetInvalid

#: Maximum bytes of a line. 16 MiB are about four million tokens, more than any base reads.
MAX_LINE = 1 << 24

#: Maximum levels of nested lists and objects. A tool's JSON schema has about 20; templates recurse.
MAX_DEPTH = 64


def iter_rows(content: bytes | BinaryIO) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, with their numbers from 1, without line ends and byte order marks.

    Of a line longer than `MAX_LINE`, which `parse` refuses, only the beginning is read.
    """
    file = io.BytesIO(content) if isinstance(content, bytes) else content
    number = 0
    while row := file.readline(MAX_LINE + 1):
        number += 1
        while len(row) > MAX_LINE and not row.endswith(b"\n") and (rest := file.readline(MAX_LINE)):
            if rest.endswith(b"\n"):
                break
        row = row.rstrip(b"\r\n").removeprefix(codecs.BOM_UTF8)
        if row.strip():
            yield number, row


def parse(row: bytes | str) -> Any:
    """The value of one line, or of any JSON text.

    Raises:
        DatasetInvalid: it isn't JSON in UTF-8, repeats a key, contains NaN or a lone surrogate, or is too long or
            nested too deeply. The message calls it "it" and names no file.
    """
    if len(row) > MAX_LINE:
        raise DatasetInvalid(_TOO_LONG)
    text = row if isinstance(row, str) else decode(row)
    value, end = _read(text, _skip_space(text, 0))
    if (rest := _skip_space(text, end)) < len(text):
        raise _not_json("Extra data", text, rest)
    return value


def iter_items(text: str) -> Iterator[Any]:
    """The items of a JSON list, one after another.

    Raises:
        DatasetInvalid: as `parse`; the message names the item, from 1, unless the text is not JSON at all.
    """
    at = _skip_space(text, _skip_space(text, 0) + 1)
    number = 0
    while text[at : at + 1] != "]" or number:
        number += 1
        try:
            value, end = _read(text, at)
        except DatasetInvalid as error:
            raise DatasetInvalid(f"row {number}: {error.message}") from error
        yield value
        at = _skip_space(text, end)
        if text[at : at + 1] == "]":
            break
        if text[at : at + 1] != ",":
            raise _not_json("',' or ']' is missing", text, at)
        at = _skip_space(text, at + 1)
    if (rest := _skip_space(text, at + 1)) < len(text):
        raise _not_json("Extra data", text, rest)


def decode(row: bytes) -> str:
    """Text in UTF-8.

    Raises:
        DatasetInvalid: as `parse`.
    """
    try:
        return row.decode()
    except UnicodeDecodeError as error:
        character = row[error.start : error.start + 1].decode("cp1252", "ignore")
        hint = f" (in Windows-1252 it is '{character}')" if character.isprintable() and character else ""
        raise DatasetInvalid(f"byte {error.start + 1} is not UTF-8{hint}; save the file as UTF-8.") from error


def short_repr(value: object) -> str:
    """A value of a user for a message: short and printable."""
    text = ascii(value)
    return text if len(text) <= 40 else f"{text[:40]}…"


def check_tree(value: object) -> None:
    """Checks for values that JSON can express but that can't be stored as text, and for deep nesting.

    Raises:
        DatasetInvalid: a lone surrogate, or more than `MAX_DEPTH` levels.
    """
    stack = [(value, "", 1)]
    while stack:
        item, where, depth = stack.pop()
        if depth > MAX_DEPTH and isinstance(item, dict | list):
            raise DatasetInvalid(_TOO_DEEP)
        if isinstance(item, str):
            _check_text(item, where or "it")
        elif isinstance(item, dict):
            for key, inner in item.items():
                _check_text(key, f"a key of {where or 'the object'}")
                stack.append((inner, f"{where}.{key}" if where else key, depth + 1))
        elif isinstance(item, list):
            stack += [(inner, f"{where}[{index}]", depth + 1) for index, inner in enumerate(item)]


_TOO_LONG = f"it is longer than {MAX_LINE >> 20} MiB; split it, or remove it."
_TOO_DEEP = f"it is nested too deeply, more than {MAX_DEPTH} levels; make it flatter."


def _skip_space(text: str, at: int) -> int:
    """The position of the next character that is not white space in JSON."""
    found = _SPACE.match(text, at)
    return found.end() if found else at


def _read(text: str, at: int) -> tuple[Any, int]:
    """The value at a position, and the position after it."""
    try:
        value, end = _DECODER.raw_decode(text, at)
    except RecursionError as error:
        raise DatasetInvalid(_TOO_DEEP) from error
    except json.JSONDecodeError as error:
        raise _not_json(error.msg, text, error.pos) from error
    except ValueError as error:  # the interpreter's own limit, against quadratic time
        raise DatasetInvalid("it contains an integer of more than 4300 digits; write a shorter one.") from error
    if end - at > MAX_LINE:
        raise DatasetInvalid(_TOO_LONG)
    if text.count("{", at, end) + text.count("[", at, end) > MAX_DEPTH or text.find("\\u", at, end) >= 0:
        check_tree(value)
    return value, end


def _not_json(why: str, text: str, at: int) -> DatasetInvalid:
    before = text.count("\n", 0, at)
    line = f"line {before + 1}, " if before else ""
    return DatasetInvalid(f"it is not JSON: {why} at {line}character {at - text.rfind(chr(10), 0, at)}.")


def _check_text(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DatasetInvalid(
            f"{where} contains a lone surrogate (\\ud800 to \\udfff), which is invalid Unicode; remove it."
        ) from error


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise DatasetInvalid(f"an object has the key {repeated!a} twice; keep one.")
    return value


def _refuse_constant(name: str) -> object:
    raise DatasetInvalid(f"it is not JSON: {name} is not a number in JSON; write a finite number, or null.")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise DatasetInvalid(f"it contains the number {text[:40]}, which is too large.")
    return value


_SPACE = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder(object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant, parse_float=_finite)
