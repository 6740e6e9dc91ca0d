"""`loramill adapters`, `promote` and `rollback`: adapters, their versions and aliases."""

from __future__ import annotations

from typing import Annotated

import typer

from loramill.cli import complete
from loramill.cli.deleting import delete_adapters, rename_adapter
from loramill.cli.export import export
from loramill.cli.format import (
    JsonFlag,
    ListByDefault,
    print_fields,
    print_json,
    print_line,
    print_message,
    print_table,
    short_version,
    time_ago,
)
from loramill.cli.importing import import_adapter
from loramill.cli.jobs import Tenant
from loramill.cli.merge import merge
from loramill.client import Client
from loramill.client.models import Adapter as AdapterView
from loramill.types import Alias

adapters = typer.Typer(cls=ListByDefault, help="List and change adapters and their versions. Default: list.")

Adapter = Annotated[
    str,
    typer.Argument(
        metavar="TENANT/ADAPTER",
        help="Name of the adapter, such as acme/support.",
        show_default=False,
        autocompletion=complete.adapters,
    ),
]
Versioned = Annotated[
    str,
    typer.Argument(
        metavar="TENANT/ADAPTER[@VERSION]",
        help="Adapter and version: acme/support@3f2a9c01. The version is an alias or at least 8 digits of a hash.",
        show_default=False,
        autocompletion=complete.adapters,
    ),
]
Selected = Annotated[
    str | None,
    typer.Argument(metavar="[VERSION]", help="Version, if not part of the first argument.", show_default=False),
]


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    adapters.command("delete")(delete_adapters)
    adapters.command("rename")(rename_adapter)
    adapters.command("export")(export)
    adapters.command("import")(import_adapter)
    adapters.command("merge")(merge)
    adapters.command("pin")(pin)
    adapters.command("unpin")(unpin)
    adapters.command("warm")(warm)
    app.add_typer(adapters, name="adapters", rich_help_panel="Adapters")
    app.command(rich_help_panel="Adapters")(promote)
    app.command(rich_help_panel="Adapters")(rollback)


@adapters.command("list")
def list_adapters(tenant: Tenant = None, json: JsonFlag = False) -> None:
    """List adapters with the versions of their aliases."""
    with Client() as client:
        found = client.adapters.list(tenant)
    if json:
        return print_json(found)
    return print_table(
        ("ADAPTER", "CHAMPION", "CHALLENGER", "PREVIOUS", "CREATED"),
        (
            (
                each.name,
                short_version(each.champion),
                short_version(each.challenger),
                short_version(each.previous),
                time_ago(each.created_at),
            )
            for each in found
        ),
        empty="No adapters yet: `loramill submit TENANT/ADAPTER --train FILE` creates the first version of one.",
    )


@adapters.command("show")
def show_adapter(name: Adapter, json: JsonFlag = False) -> None:
    """Show an adapter's versions, evaluation scores and alias history."""
    with Client() as client:
        adapter = client.adapters.get(name)
    if json:
        return print_json(adapter)
    print_table(
        ("VERSION", "ALIASES", "JOB", "SIZE", "CREATED"),
        (
            (
                short_version(version.id),
                ", ".join(_aliases(adapter, version.id)) or "-",
                version.job or "-",
                f"{version.bytes / 1e6:.1f} MB",
                time_ago(version.created_at),
            )
            for version in adapter.versions
        ),
        empty=f"{name} has no versions yet.",
    )
    for title, rows in (("Scores", _score_fields(adapter)), ("History", _history_fields(adapter))):
        if rows:
            print_line(f"\n{title}")
            print_fields(rows)
    return None


def _aliases(adapter: AdapterView, version: str) -> list[str]:
    return [alias for alias in Alias if getattr(adapter, alias) == version]


def _score_fields(adapter: AdapterView) -> list[tuple[str, str]]:
    return [
        (
            short_version(each.version) if each.version else "base",
            f"{each.slice} ({each.examples}): "
            + ", ".join(f"{name} {value:.3f}" for name, value in each.metrics.items()),
        )
        for each in adapter.evaluations
    ]


def _history_fields(adapter: AdapterView) -> list[tuple[str, str]]:
    return [
        (time_ago(move.created_at), f"{move.alias} -> {short_version(move.version)}  {move.reason}")
        for move in adapter.history
    ]


def promote(name: Versioned, version: Selected = None, json: JsonFlag = False) -> None:
    """Make a version the champion, which answers requests."""
    name, version = _split_version(name, version)
    if version is None:
        raise typer.BadParameter(
            f"give a version: an alias, such as {name}@challenger, or a version that `adapters show {name}` lists."
        )
    with Client() as client:
        adapter = client.adapters.promote(name, version)
    if json:
        print_json(adapter)
    else:
        print_message(
            f"{name} now answers with {short_version(adapter.champion)} (before: {short_version(adapter.previous)})."
        )


def rollback(name: Adapter, json: JsonFlag = False) -> None:
    """Make the previous champion the champion again."""
    with Client() as client:
        adapter = client.adapters.rollback(name)
    if json:
        print_json(adapter)
    else:
        print_message(f"{name} answers with {short_version(adapter.champion)} again.")


def _split_version(name: str, version: str | None) -> tuple[str, str | None]:
    """The adapter's name and the version, which may be part of the name (NAME@VERSION)."""
    name, at, within = name.partition("@")
    if at and version is not None:
        raise typer.BadParameter(f"{within} and {version} are two versions; give one.")
    if at and not within:
        raise typer.BadParameter("give a version or an alias after the '@', such as @previous.")
    return name, within or version


def pin(name: Versioned, version: Selected = None, json: JsonFlag = False) -> None:
    """Make a version (default: the current champion) the champion until it is unpinned.

    No nightly run, promotion or rollback replaces a pinned champion.
    """
    name, version = _split_version(name, version)
    with Client() as client:
        adapter = client.adapters.pin(name, version or Alias.CHAMPION.value)
    if json:
        print_json(adapter)
    else:
        print_message(f"{name} answers with {short_version(adapter.champion)} until `loramill adapters unpin {name}`.")


def unpin(name: Adapter, json: JsonFlag = False) -> None:
    """Allow the champion to change again."""
    with Client() as client:
        adapter = client.adapters.unpin(name)
    if json:
        print_json(adapter)
    else:
        print_message(f"{name} answers with {short_version(adapter.champion)}; promotions are allowed again.")


def warm(name: Versioned, version: Selected = None) -> None:
    """Load a version (default: the champion) before its first request."""
    name, version = _split_version(name, version)
    version = version or Alias.CHAMPION.value
    with Client() as client:
        seconds = client.adapters.warm(name, version)
    print_message(f"{name}@{version} is loaded; its first token took {seconds:.2f} s.")
