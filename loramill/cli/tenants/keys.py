"""`loramill key`: API keys of tenants. Creating and revoking one needs an admin's key."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from loramill.cli.arguments import JsonFlag, TenantArgument
from loramill.cli.format import local_time, print_json, print_line, print_message, print_table, time_ago
from loramill.client import Client
from loramill.durations import parse_duration
from loramill.types import KeyRecord, Scope


def create_key(
    tenant: TenantArgument,
    scope: Annotated[list[Scope] | None, typer.Option(help="Scope to grant (repeatable). Default: all scopes.")] = None,
    expires: Annotated[
        str | None,
        typer.Option(
            metavar="DURATION", help="Time until the key expires, such as 90s, 15m, 12h or 30d. Default: never."
        ),
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Create an API key and print it. It can't be shown again."""
    expires_at = None if expires is None else time.time() + _read_expires(expires)
    with Client() as client:
        made = client.keys.create(tenant, scopes=scope or None, expires_at=expires_at)
    if json:
        return print_json(made)
    print_message(f"{made.id}, a key of {tenant}; this is the only time it is shown:")
    return print_line(made.key)


def list_keys(tenant: TenantArgument, json: JsonFlag = False) -> None:
    """List a tenant's keys, without their secrets."""
    with Client() as client:
        found = client.keys.list(tenant)
    if json:
        return print_json(found)
    return print_table(
        ("KEY", "ENDS WITH", "SCOPES", "CREATED", "EXPIRES"),
        ((each.id, each.hint, _format_scopes(each), time_ago(each.created_at), _format_expiry(each)) for each in found),
        empty=f"{tenant} has no keys: `loramill key create {tenant}` creates one.",
    )


def revoke_key(key_id: Annotated[str, typer.Argument(metavar="KEY", help="ID of the key (key-…).")]) -> None:
    """Revoke a key immediately."""
    with Client() as client:
        client.keys.revoke(key_id)
    print_message(f"{key_id} is revoked.")


def _read_expires(text: str) -> float:
    try:
        return parse_duration(text)
    except ValueError as error:
        raise typer.BadParameter(f"{error}.", param_hint="--expires") from error


def _format_scopes(key: KeyRecord) -> str:
    return "all" if set(key.scopes) == set(Scope) else ", ".join(key.scopes)


def _format_expiry(key: KeyRecord) -> str:
    if key.revoked_at is not None:
        return f"revoked {time_ago(key.revoked_at)}"
    return "-" if key.expires_at is None else local_time(key.expires_at)
