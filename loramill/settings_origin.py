"""The effective settings: the value and the origin of each."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_settings import EnvSettingsSource, TomlConfigSettingsSource

from loramill.settings import Settings
from loramill.types import FrozenModel

_MASK = "…"
#: Secrets in a URL's query.
_SECRET = re.compile(r"(?i)(\w*(?:password|secret|token|key))=[^&]*")


class Setting(FrozenModel):
    """One setting.

    Attributes:
        name: as in loramill.toml, with the section before a dot.
        value: in JSON's types; secrets are masked.
        origin: "default", the path of loramill.toml, or the variable's name.
        description: its description.
    """

    name: str
    value: Any
    origin: str
    description: str


def effective_settings() -> list[Setting]:
    """The value and the origin of each setting.

    Raises:
        SettingsInvalid: a key is unknown or a value is invalid.
    """
    settings = Settings.load()
    variables, file = EnvSettingsSource(Settings)(), TomlConfigSettingsSource(Settings)()
    resolved = {"database_url": settings.database, "artifacts_url": settings.artifacts, "url": settings.gateway}
    found = []
    for path, value, description in _fields(settings):
        name = ".".join(path)
        if _contains(variables, path):
            origin = _variable_name(path)
        elif _contains(file, path):
            origin = str(Path("loramill.toml").absolute())
        elif name == "url" and settings.address_file.exists():
            origin = str(settings.address_file)
        else:
            origin = "default"
        masked = _masked(name, resolved.get(name) if value is None else value)
        found.append(Setting(name=name, value=masked, origin=origin, description=description))
    return found


def _fields(section: BaseModel, above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any, str]]:
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from _fields(value, (*above, name))
        else:
            yield (*above, name), section.model_dump(mode="json", include={name})[name], field.description or ""


def _contains(source: Mapping[str, Any], path: tuple[str, ...]) -> bool:
    for part in path:
        if not isinstance(source, Mapping) or part not in source:
            return False
        source = source[part]
    return True


def _variable_name(path: tuple[str, ...]) -> str:
    """Name of the variable that sets a setting: its own, or that of its section, which holds JSON."""
    names = {name.upper(): name for name in os.environ}
    own = f"LORAMILL_{'__'.join(path)}".upper()
    return names.get(own) or names.get(f"LORAMILL_{path[0]}".upper(), own)


def _masked(name: str, value: Any) -> Any:
    if name == "api_key":
        return value and f"{value[:5]}{_MASK}"
    if not name.endswith("url") or not isinstance(value, str):
        return value
    scheme, _, rest = value.partition("://")
    user, at, where = rest.rpartition("@")
    user = f"{user.partition(':')[0]}:{_MASK}" if ":" in user else user
    return _SECRET.sub(rf"\1={_MASK}", f"{scheme}://{user}{at}{where}")
