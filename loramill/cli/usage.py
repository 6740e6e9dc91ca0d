"""`loramill usage` and `loramill audit`: what tenants asked, and who changed what."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

import typer

from loramill.cli.format import JsonFlag, exact_size, local_minute, print_json, print_table, short_version
from loramill.cli.jobs import Tenant
from loramill.client import Client
from loramill.types import Scope

Days = Annotated[int, typer.Option(min=1, max=36_500, help="How many, with today.")]
Limit = Annotated[int, typer.Option("-n", "--limit", min=1, help="At most so many.")]

#: Shorter names for fields of the audit's details.
_SHORT_NAMES = {
    "requests_per_minute": "requests/min",
    "tokens_per_minute": "tokens/min",
    "concurrent_requests": "at-once",
    "stored_bytes": "stored",
    "expires_at": "expires",
}


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    app.command(rich_help_panel="Tenants")(usage)
    app.command(rich_help_panel="Tenants")(audit)


def usage(tenant: Tenant = None, days: Days = 30, json: JsonFlag = False) -> None:
    """Show what was asked on each day (UTC), in requests and tokens."""
    today = datetime.now(UTC).date()
    with Client() as client:
        found = client.usage(tenant, first=today - timedelta(days - 1), last=today)
    if json:
        return print_json(found)
    return print_table(
        ("DAY", "TENANT", "MODEL", "REQUESTS", "PROMPT TOKENS", "COMPLETION TOKENS"),
        (
            (
                each.day,
                each.tenant or "(admin)",
                each.model if each.version is None else f"{each.model}@{short_version(each.version)}",
                str(each.requests),
                str(each.prompt_tokens),
                str(each.completion_tokens),
            )
            for each in found
        ),
        empty=f"Nothing was asked in {days} days.",
    )


def audit(tenant: Tenant = None, limit: Limit = 50, json: JsonFlag = False) -> None:
    """Show what was changed through the API, and with whose key, newest first."""
    with Client() as client:
        found = client.audit(tenant, limit=limit)
    if json:
        return print_json(found)
    return print_table(
        ("WHEN", "KEY", "OF", "ACTION", "ON", "DETAILS"),
        (
            (
                local_minute(each.created_at),
                _short_id(each.key),
                each.actor or "(admin)",
                each.action,
                _short_id(each.subject),
                _format_details(each.details),
            )
            for each in found
        ),
        empty="Nothing was changed yet.",
    )


def _short_id(text: str) -> str:
    """An id as it is shown: its kind and its first 8 digits. Names stay as they are."""
    return re.sub(r"\b(file|ftjob|ftckpt|key)-([0-9a-f]{8})[0-9a-f]{16}\b", r"\1-\2", text)


def _format_details(details: Mapping[str, Any]) -> str:
    """What a change set, as NAME=VALUE pairs; None, such as no limit, is left out."""
    pairs = [
        f"{_SHORT_NAMES.get(name, name)}={_format_value(name, value)}"
        for name, value in details.items()
        if value is not None
    ]
    return " ".join(pairs) or ("unlimited" if details else "-")


def _format_value(name: str, value: object) -> str:
    if name == "expires_at" and isinstance(value, float):
        return local_minute(value).partition(" ")[0]
    if name == "stored_bytes" and isinstance(value, int):
        return exact_size(value).replace(" ", "")
    if isinstance(value, list):
        return "all" if set(value) == set(Scope) else ",".join(map(str, value))
    if isinstance(value, int | float):
        return f"{value:,.10g}"
    text = str(value)
    return short_version(text) if re.fullmatch(r"[0-9a-f]{64}", text) else _short_id(text)
