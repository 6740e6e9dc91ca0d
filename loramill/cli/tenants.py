"""`loramill tenant` and `loramill key`: who may use the gateway. They need the admin's key."""

from __future__ import annotations

from typing import Annotated

import typer

from loramill.cli import show
from loramill.client import Client, Quota

tenant = typer.Typer(help="Owners of data, jobs, adapters and keys.", no_args_is_help=True)
key = typer.Typer(help="API keys of a tenant.", no_args_is_help=True)

Tenant = Annotated[str, typer.Argument(help="The tenant's name.", show_default=False)]


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    app.add_typer(tenant, name="tenant", rich_help_panel="Tenants")
    app.add_typer(key, name="key", rich_help_panel="Tenants")


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


def _read_quota(text: str | None, option: str) -> Quota:
    if text is None:
        return None
    if text == "unlimited":
        return "unlimited"
    if not text.isdecimal():
        raise typer.BadParameter("give a number of jobs, or unlimited.", param_hint=option)
    return int(text)


def _quota(jobs: int | None) -> str:
    return "unlimited" if jobs is None else str(jobs)


@key.command("create")
def create_key(tenant: Tenant, json: show.AsJson = False) -> None:
    """Make an API key and print it; it can't be shown again."""
    with Client() as client:
        made = client.create_key(tenant)
    if json:
        return show.as_json(made)
    show.say(f"{made.id}, a key of {tenant}; this is the only time it is shown:")
    return show.line(made.key)


@key.command("list")
def list_keys(tenant: Tenant, json: show.AsJson = False) -> None:
    """List a tenant's keys, without their secrets."""
    with Client() as client:
        found = client.keys(tenant)
    if json:
        return show.as_json(found)
    return show.table(
        ("KEY", "ENDS WITH", "MADE", "REVOKED"),
        (
            (each.id, each.hint, show.ago(each.created_at), show.ago(each.revoked_at) if each.revoked_at else "-")
            for each in found
        ),
        empty=f"{tenant} has no keys: `loramill key create {tenant}` makes one.",
    )


@key.command("revoke")
def revoke_key(key_id: Annotated[str, typer.Argument(metavar="KEY", help="The key's id (key-…).")]) -> None:
    """Make a key worthless at once."""
    with Client() as client:
        client.revoke_key(key_id)
    show.say(f"{key_id} is revoked.")
