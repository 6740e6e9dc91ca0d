"""`loramill settings`: all settings, their values and sources."""

from __future__ import annotations

from typing import Any

from loramill.cli.arguments import JsonFlag
from loramill.cli.format import print_json, print_table


def settings(json: JsonFlag = False) -> None:
    """Print all settings with their values and sources. Secrets are masked."""
    from loramill.settings_origin import effective_settings

    found = effective_settings()
    if json:
        print_json(found)
        return
    rows = [(each.name, _format_value(each.value), each.origin) for each in found]
    print_table(("SETTING", "VALUE", "SOURCE"), rows, empty="")


def _format_value(value: Any) -> str:
    """Formats the value of a setting."""
    if value is None:
        return "-"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return str(value).lower() if isinstance(value, bool) else str(value)
