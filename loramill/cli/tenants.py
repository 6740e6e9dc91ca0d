"""`loramill tenant`: who may use the gateway, and how much of it. It needs the admin's key."""

from __future__ import annotations

from typing import Annotated

import typer

from loramill.cli import show
from loramill.client import Client
from loramill.options import given
from loramill.tenancy import Quota
from loramill.types import TenantRecord

tenant = typer.Typer(help="Owners of data, jobs, adapters and keys.", no_args_is_help=True)

Tenant = Annotated[str, typer.Argument(help="The tenant's name.", show_default=False)]


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    app.add_typer(tenant, name="tenant", rich_help_panel="Tenants")


@tenant.command("create")
def create_tenant(name: Tenant, json: show.AsJson = False) -> None:
    """Make a tenant."""
    with Client() as client:
        made = client.create_tenant(name)
    if json:
        show.as_json(made)
    else:
        show.say(f"Tenant {made.name} is made; `loramill key create {made.name}` gives it a key.")


@tenant.command("list")
def list_tenants(json: show.AsJson = False) -> None:
    """List the tenants."""
    with Client() as client:
        found = client.tenants()
    if json:
        return show.as_json(found)
    return show.table(
        ("TENANT", "MADE", "WEIGHT", "RUNNING", "WAITING"),
        (
            (
                each.name,
                show.ago(each.created_at),
                f"{each.weight:g}",
                _quota(each.max_running),
                _quota(each.max_queued),
            )
            for each in found
        ),
        empty="No tenants yet: `loramill tenant create NAME` makes one.",
    )


@tenant.command("share")
def set_share(
    name: Tenant,
    weight: Annotated[float | None, typer.Option(help="Tokens it may train on, relative to other tenants'.")] = None,
    max_running: Annotated[
        str | None, typer.Option(metavar="JOBS", help="Jobs that run at once: a number, or unlimited.")
    ] = None,
    max_queued: Annotated[
        str | None, typer.Option(metavar="JOBS", help="Jobs that may wait: a number, or unlimited.")
    ] = None,
    json: show.AsJson = False,
) -> None:
    """Set a tenant's share of the pool; what isn't given stays as it is."""
    running, queued = _read_quota(max_running, "--max-running"), _read_quota(max_queued, "--max-queued")
    with Client() as client:
        set_to = client.set_share(name, weight=weight, max_running=running, max_queued=queued)
    if json:
        show.as_json(set_to)
    else:
        show.say(
            f"{set_to.name} has the weight {set_to.weight:g}; running at most: {_quota(set_to.max_running)}, "
            f"waiting at most: {_quota(set_to.max_queued)}."
        )


@tenant.command("limits")
def set_limits(
    name: Tenant,
    requests: Annotated[str | None, typer.Option(metavar="N", help="Requests a minute, or unlimited.")] = None,
    tokens: Annotated[
        str | None, typer.Option(metavar="N", help="Tokens a minute, of prompts and answers, or unlimited.")
    ] = None,
    concurrent: Annotated[
        str | None, typer.Option(metavar="N", help="Requests that run at once, or unlimited.")
    ] = None,
    stored: Annotated[str | None, typer.Option(metavar="BYTES", help="Bytes of its files, or unlimited.")] = None,
    json: show.AsJson = False,
) -> None:
    """Set what a tenant may use of the gateways; what isn't given stays as it is. Alone it shows the limits."""
    asked = {
        "requests_per_minute": _read_quota(requests, "--requests"),
        "tokens_per_minute": _read_quota(tokens, "--tokens"),
        "concurrent_requests": _read_quota(concurrent, "--concurrent"),
        "stored_bytes": _read_quota(stored, "--stored"),
    }
    with Client() as client:
        set_to = client.set_limits(name, **asked) if given(asked) else client.tenant(name)
    if json:
        show.as_json(set_to)
    else:
        show.facts(_limits(set_to))


def _limits(tenant: TenantRecord) -> list[tuple[str, show.Cell]]:
    return [
        ("requests a minute", _quota(tenant.requests_per_minute)),
        ("tokens a minute", _quota(tenant.tokens_per_minute)),
        ("requests at once", _quota(tenant.concurrent_requests)),
        ("bytes stored", _quota(tenant.stored_bytes)),
    ]


def _read_quota(text: str | None, option: str) -> Quota:
    if text is None:
        return None
    if text == "unlimited":
        return "unlimited"
    if not text.isdecimal():
        raise typer.BadParameter("give a number, or unlimited.", param_hint=option)
    return int(text)


def _quota(limit: int | None) -> str:
    return "unlimited" if limit is None else str(limit)
