"""Adds the commands of the panel "Tenants"."""

from __future__ import annotations

import typer

from loramill.cli.tenants.create import create_tenants
from loramill.cli.tenants.delete import delete_tenants
from loramill.cli.tenants.keys import create_key, list_keys, revoke_key
from loramill.cli.tenants.limits import list_tenants, set_limits, set_share, set_storage
from loramill.cli.tenants.usage import audit, usage

tenant = typer.Typer(help="Create, list, limit and delete tenants (needs an admin's key).", no_args_is_help=True)
key = typer.Typer(help="Create, list and revoke API keys of tenants.", no_args_is_help=True)


def add_tenant_commands(app: typer.Typer) -> None:
    """Adds the commands to the root."""
    tenant.command("delete")(delete_tenants)
    tenant.command("create")(create_tenants)
    tenant.command("list")(list_tenants)
    tenant.command("share")(set_share)
    tenant.command("limits")(set_limits)
    tenant.command("storage")(set_storage)
    key.command("create")(create_key)
    key.command("list")(list_keys)
    key.command("revoke")(revoke_key)
    app.command(rich_help_panel="Tenants")(usage)
    app.command(rich_help_panel="Tenants")(audit)
    app.add_typer(tenant, name="tenant", rich_help_panel="Tenants")
    app.add_typer(key, name="key", rich_help_panel="Tenants")
