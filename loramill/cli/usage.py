"""`loramill usage` and `loramill audit`: what tenants asked, and who changed what."""

from __future__ import annotations

import json as json_text
from datetime import UTC, datetime, timedelta
from typing import Annotated

import typer

from loramill.cli import show
from loramill.cli.jobs import Tenant
from loramill.client import Client

Days = Annotated[int, typer.Option(min=1, max=36_500, help="How many, with today.")]
Lines = Annotated[int, typer.Option("-n", "--limit", min=1, help="At most so many.")]


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    app.command(rich_help_panel="Tenants")(usage)
    app.command(rich_help_panel="Tenants")(audit)


def usage(tenant: Tenant = None, days: Days = 30, json: show.AsJson = False) -> None:
    """Show what was asked on each day (UTC), in requests and tokens."""
    today = datetime.now(UTC).date()
    with Client() as client:
        found = client.usage(tenant, first=today - timedelta(days - 1), last=today)
    if json:
        return show.as_json(found)
    return show.table(
        ("DAY", "TENANT", "MODEL", "REQUESTS", "PROMPT TOKENS", "COMPLETION TOKENS"),
        (
            (
                each.day,
                each.tenant or "(admin)",
                each.model if each.version is None else f"{each.model}@{show.short(each.version)}",
                str(each.requests),
                str(each.prompt_tokens),
                str(each.completion_tokens),
            )
            for each in found
        ),
        empty=f"Nothing was asked in {days} days.",
    )


def audit(tenant: Tenant = None, limit: Lines = 50, json: show.AsJson = False) -> None:
    """Show what was changed through the API, and with whose key, newest first."""
    with Client() as client:
        found = client.audit(tenant, limit=limit)
    if json:
        return show.as_json(found)
    return show.table(
        ("WHEN", "KEY", "OF", "ACTION", "ON", "DETAILS"),
        (
            (
                show.clock(each.created_at),
                each.key,
                each.actor or "(admin)",
                each.action,
                each.subject,
                json_text.dumps(each.details) if each.details else "-",
            )
            for each in found
        ),
        empty="Nothing was changed yet.",
    )
