"""`loramill adapters list`, `show` and `rename`."""

from __future__ import annotations

from typing import Annotated

import typer

from loramill.cli.adapters.canary import describe_rollout
from loramill.cli.arguments import AdapterArgument, JsonFlag, TenantOption
from loramill.cli.format import (
    print_fields,
    print_json,
    print_line,
    print_message,
    print_table,
    short_version,
    time_ago,
)
from loramill.client import Client
from loramill.client.models import Adapter
from loramill.types import Alias


def list_adapters(tenant: TenantOption = None, json: JsonFlag = False) -> None:
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


def show_adapter(name: AdapterArgument, json: JsonFlag = False) -> None:
    """Show an adapter's versions, rollouts, evaluation scores and alias history."""
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
    parts = {
        "Rollouts": _rollout_fields(adapter),
        "Scores": _score_fields(adapter),
        "History": _history_fields(adapter),
    }
    for title, rows in parts.items():
        if rows:
            print_line(f"\n{title}")
            print_fields(rows)
    return None


def _aliases(adapter: Adapter, version: str) -> list[str]:
    return [alias for alias in Alias if getattr(adapter, alias) == version]


def _rollout_fields(adapter: Adapter) -> list[tuple[str, str]]:
    return [(time_ago(each.started_at), describe_rollout(each)) for each in adapter.rollouts]


def _score_fields(adapter: Adapter) -> list[tuple[str, str]]:
    return [
        (
            short_version(each.version) if each.version else "base",
            f"{each.slice} ({each.examples}): "
            + ", ".join(f"{name} {value:.3f}" for name, value in each.metrics.items()),
        )
        for each in adapter.evaluations
    ]


def _history_fields(adapter: Adapter) -> list[tuple[str, str]]:
    return [
        (time_ago(move.created_at), f"{move.alias} -> {short_version(move.version)}  {move.reason}")
        for move in adapter.history
    ]


def rename_adapter(
    name: AdapterArgument,
    to: Annotated[str, typer.Argument(metavar="NEW", help="New name; the tenant stays the same.", show_default=False)],
    json: JsonFlag = False,
) -> None:
    """Rename an adapter with all its versions, aliases and jobs. The old name stops working."""
    with Client() as client:
        renamed = client.adapters.rename(name, to)
    if json:
        print_json(renamed)
    else:
        print_message(f"{name} is now {renamed.name}.")
