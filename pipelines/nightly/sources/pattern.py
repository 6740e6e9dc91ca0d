"""The URL of a source with its placeholders, as a glob for fsspec and as the names that a path contains. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import takewhile
from pathlib import Path, PurePosixPath

from loramill.errors import InvalidRequest
from loramill.names import AdapterName
from loramill.pipelines.nightly.definition import matches

_PARTS = re.compile(
    r"\{(?P<name>tenant|adapter)\}|(?P<glob>\*\*/|\*\*|\*|\?|\[[^\]]*\])|(?P<text>.[^{*?\[]*)", re.DOTALL
)
#: As fsspec reads them: `**/` is any number of folders, and also none.
_GLOBS = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}


def glob_of(url: str) -> str:
    """The glob that matches the files of all tenants and adapters: each placeholder becomes `*`."""
    return url.replace("{tenant}", "*").replace("{adapter}", "*")


def fixed_folder(pattern: str) -> Path:
    """The folder of a pattern's files, up to the first part that has a placeholder or a wildcard."""
    return Path(*_fixed_parts(pattern))


def bucket_of(pattern: str) -> str:
    """The bucket of a pattern of an object store; empty if a placeholder or a wildcard stands in its place."""
    return next((part for part in _fixed_parts(pattern) if part != "/"), "")


def _fixed_parts(pattern: str) -> Iterable[str]:
    return takewhile(lambda part: not set("*{?[") & set(part), PurePosixPath(pattern).parts[:-1])


def names_in(pattern: str, path: str) -> Mapping[str, str] | None:
    """The tenant and the adapter that a path has in the place of a pattern's placeholders; None if it doesn't match."""
    found = re.fullmatch(_expression(pattern), path, re.DOTALL)
    return None if found is None else found.groupdict()


def owners(names: Mapping[str, str], globs: Iterable[str], adapters: Iterable[str]) -> list[AdapterName]:
    """The adapters that a file is for.

    Args:
        names: what its path names.
        globs: those of the source.
        adapters: the existing adapters; one that does not exist yet must be named by the path, or literally by a glob.
    """
    wanted = tuple(globs)
    if len(names) == 2:
        candidates = [f"{names['tenant']}/{names['adapter']}"]
    else:
        candidates = sorted({*adapters, *(glob for glob in wanted if not set("*?[") & set(glob))})
    found = []
    for candidate in candidates:
        if not matches(candidate, wanted):
            continue
        try:
            name = AdapterName.parse(candidate)
        except InvalidRequest:
            continue  # not a folder of an adapter, such as .cache
        if all(getattr(name, part) == value for part, value in names.items()):
            found.append(name)
    return found


def _expression(pattern: str) -> str:
    parts, named = [], set[str]()
    for part in _PARTS.finditer(pattern):
        name, glob, text = part["name"], part["glob"], part["text"]
        if name:
            parts.append(f"(?P={name})" if name in named else f"(?P<{name}>[^/]+)")
            named.add(name)
        elif glob:
            parts.append(_GLOBS.get(glob) or glob.replace("[!", "[^", 1))
        else:
            parts.append(re.escape(text))
    return "".join(parts)
