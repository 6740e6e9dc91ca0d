"""`loramill usage` and `loramill audit`: requests and tokens per day, and the log of changes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

import typer

from loramill.cli.arguments import JsonFlag, TenantOption
from loramill.cli.format import exact_size, local_minute, print_json, print_table, short_version
from loramill.client import Client
from loramill.types import Scope

Days = Annotated[int, typer.Option(min=1, max=36_500, help="Number of days, including today.")]
Limit = Annotated[int, typer.Option("-n", "--limit", min=1, help="Maximum number of changes, newest first.")]

#: Shorter names of fields in an audit entry's details.
_SHORT_NAMES = {
    "requests_per_minute": "requests/min",
    "tokens_per_minute": "tokens/min",
    "concurrent_requests": "at-once",
    "stored_bytes": "stored",
    "expires_at": "expires",
}


def usage(tenant: TenantOption = None, days: Days = 30, json: JsonFlag = False) -> None:
    """Show requests and tokens per day (UTC), tenant and model."""
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
        empty=f"No requests in {days} days.",
    )


def audit(tenant: TenantOption = None, limit: Limit = 50, json: JsonFlag = False) -> None:
    """Show changes made through the API, newest first."""
    with Client() as client:
        found = client.audit(tenant, limit=limit)
    if json:
        return print_json(found)
    return print_table(
        ("TIME", "KEY", "TENANT", "ACTION", "OBJECT", "DETAILS"),
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
        empty="No changes yet.",
    )


def _short_id(text: str) -> str:
    """Shortens ids to their prefix and first 8 digits; names are unchanged."""
    return re.sub(r"\b(file|ftjob|ftckpt|key)-([0-9a-f]{8})[0-9a-f]{16}\b", r"\1-\2", text)


def _format_details(details: Mapping[str, Any]) -> str:
    """Formats the details of a change as NAME=VALUE pairs, without None."""
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
