"""Types of the fields of nightly.yaml, which read what is natural to write: `12h`, one glob instead of a list."""

from __future__ import annotations

import os
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from cronsim import CronSim, CronSimError
from pydantic import AfterValidator, BeforeValidator, PlainSerializer, ValidationInfo

from loramill.durations import DURATION_EXAMPLES, format_duration, parse_duration
from loramill.errors import SettingsInvalid
from loramill.pipelines.nightly.definition.combinations import tokens

#: `${NAME}` in a text, replaced by an environment variable when the text is used.
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
#: A time after the year 9999 can't be computed, and no one waits that long.
_LONGEST = timedelta(days=3650)
#: The time does not matter where only the expression is checked.
_SOME_TIME = datetime(2000, 1, 1, tzinfo=UTC)


def expanded(text: str) -> str:
    """Returns a text with each `${NAME}` replaced by the environment variable of that name.

    Raises:
        SettingsInvalid: a variable is not set.
    """

    def value(found: re.Match[str]) -> str:
        if found[1] not in os.environ:
            raise SettingsInvalid(f"nightly.yaml uses the environment variable {found[1]}, which is not set: set it.")
        return os.environ[found[1]]

    return _VARIABLE.sub(value, text)


def _read_duration(value: object) -> object:
    if isinstance(value, timedelta):
        return value
    if not isinstance(value, str):
        raise ValueError(f"must be a duration such as {DURATION_EXAMPLES}")
    try:
        found = timedelta(seconds=parse_duration(value))
    except (ValueError, OverflowError) as error:
        raise ValueError(f"must be a duration such as {DURATION_EXAMPLES}") from error
    if found > _LONGEST:
        raise ValueError(f"must be a duration of at most {format_duration(_LONGEST.total_seconds())}")
    return found


def _in_list(value: object) -> object:
    return (value,) if isinstance(value, str) else value


def _check_glob(value: str) -> str:
    if value != "*" and value.count("/") != 1:
        raise ValueError("must be * or tenant/adapter, where both may contain *, ? and [abc], such as acme/*")
    if any("/" in token and token != "/" for token in tokens(value)):
        raise ValueError("may not contain / in brackets: it separates tenant and adapter, as in acme/*")
    return value


def _check_location(value: str) -> str:
    if not value.strip():
        raise ValueError("may not be empty")
    unknown = set(re.findall(r"\{(.*?)\}", value)) - {"tenant", "adapter"}
    if unknown:
        raise ValueError(f"may not contain {{{min(unknown)}}}: only {{tenant}} and {{adapter}} are replaced")
    return value


def _check_cron(value: str) -> str:
    if len(value.split()) != 5:
        raise ValueError('must have five fields: minute, hour, day of month, month, day of week, such as "0 2 * * *"')
    try:
        CronSim(value, _SOME_TIME)
    except CronSimError as error:
        raise ValueError(f'must be a cron expression such as "0 2 * * *" ({error})') from error
    return value


def _check_timezone(value: str) -> str:
    try:
        ZoneInfo(value)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise ValueError('must be the name of a time zone, such as "Europe/Berlin" or "UTC"') from error
    return value


def _check_web_url(value: str) -> str:
    if not re.fullmatch(r"(https?://[^\s/]|\$\{\w+\})\S*", value):
        raise ValueError("must be a URL that begins with http:// or https://, or an environment variable as ${NAME}")
    return value


def absolute_location(value: str, folder: Path | None) -> str:
    """A path made absolute, relative to a folder (None: as it is); a URL or the ID of a dataset stays as it is."""
    if folder is None or "://" in value or value.startswith("file-"):
        return value
    return str(folder / Path(value).expanduser())


def _resolve_location(value: str, info: ValidationInfo) -> str:
    return absolute_location(value, (info.context or {}).get("folder"))


def _resolve_function(value: str, info: ValidationInfo) -> str:
    where, colon, name = value.rpartition(":")
    if not colon or not name.isidentifier():
        raise ValueError("must be package.module:function or folder/file.py:function")
    return f"{_resolve_location(where, info)}:{name}" if where.endswith(".py") else value


Duration = Annotated[
    timedelta,
    BeforeValidator(_read_duration, json_schema_input_type=str),
    PlainSerializer(lambda value: format_duration(value.total_seconds()), return_type=str),
]
#: One glob over "tenant/adapter", or "*" for all.
Glob = Annotated[str, AfterValidator(_check_glob)]
#: Globs; one may be written without a list.
Globs = Annotated[tuple[Glob, ...], BeforeValidator(_in_list)]
Texts = Annotated[tuple[str, ...], BeforeValidator(_in_list)]
Cron = Annotated[str, AfterValidator(_check_cron)]
Timezone = Annotated[str, AfterValidator(_check_timezone)]
#: A URL that may contain `${NAME}`: `expanded` returns what it stands for.
WebUrl = Annotated[str, AfterValidator(_check_web_url)]
#: A path relative to the folder of nightly.yaml, or a URL; may contain {tenant} and {adapter}.
Location = Annotated[str, AfterValidator(_check_location), AfterValidator(_resolve_location)]
#: `package.module:function`, or a file's path and `:function`; the path is relative to the folder of nightly.yaml.
PythonFunction = Annotated[str, AfterValidator(_resolve_function)]
