"""`loramill adapters retention` and `prune`: which versions are kept, and the removal of the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from loramill.cli.arguments import AdapterArgument, JsonFlag, TenantOption, YesFlag
from loramill.cli.confirm import confirm
from loramill.cli.format import (
    print_fields,
    print_json,
    print_message,
    print_table,
    rounded_size,
    short_version,
    time_ago,
)
from loramill.cli.model_options import option_help
from loramill.client import Client
from loramill.plural import counted
from loramill.submission.options import drop_none
from loramill.types import AdapterRecord, Removal, RetentionPolicy

_NOTHING = "Nothing to remove: the retention keeps every version, or something refers to it."


def _policy(name: str) -> Any:
    return typer.Option(help=option_help(RetentionPolicy, name))


def set_retention(
    name: AdapterArgument,
    keep_versions: Annotated[int | None, _policy("keep_versions")] = None,
    version_days: Annotated[float | None, _policy("version_days")] = None,
    keep_checkpoints: Annotated[int | None, _policy("keep_checkpoints")] = None,
    checkpoint_days: Annotated[float | None, _policy("checkpoint_days")] = None,
    keep_all: Annotated[bool, typer.Option("--keep-all", help="Keep all of its versions.")] = False,
    default: Annotated[bool, typer.Option("--default", help="Use the retention of the settings again.")] = False,
    json: JsonFlag = False,
) -> None:
    """Set an adapter's retention, which overrides that of the settings, or show it if no option is given.

    A version is removed if it is neither one of the newest nor younger than the age, and nothing refers to it. Options
    that are omitted are unset.
    """
    given = drop_none(
        {
            "keep_versions": keep_versions,
            "version_days": version_days,
            "keep_checkpoints": keep_checkpoints,
            "checkpoint_days": checkpoint_days,
        }
    )
    if (bool(given), keep_all, default).count(True) > 1:
        raise typer.BadParameter("--keep-all, --default and the numbers exclude each other; give one of them.")
    policy = None if default else _read_policy(given)
    with Client() as client:
        if given or keep_all or default:
            adapter: AdapterRecord = client.adapters.set_retention(name, policy)
        else:
            adapter = client.adapters.get(name)
    if json:
        print_json(adapter)
    elif adapter.retention is None:
        print_message(f"{name} has the retention of the settings (`loramill settings`).")
    else:
        kept = adapter.retention.model_dump(exclude_none=True)
        print_fields([(field, f"{value:g}") for field, value in kept.items()] or [("kept", "everything")])


def _read_policy(given: Mapping[str, float]) -> RetentionPolicy:
    try:
        return RetentionPolicy.model_validate(given)
    except ValidationError as error:
        problem = error.errors()[0]
        option = str(problem["loc"][0]).replace("_", "-")
        raise typer.BadParameter(f"{problem['msg']}.", param_hint=f"--{option}") from error


def prune_adapters(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what would be removed.")] = False,
    tenant: TenantOption = None,
    yes: YesFlag = False,
    json: JsonFlag = False,
) -> None:
    """Remove the versions that the retention of their adapters no longer keeps, as the supervisor does every hour.

    A version that an alias, an evaluation, an open job, a running nightly run or a request since yesterday refers to
    is never removed.
    """
    with Client() as client:
        planned = client.adapters.prune(dry_run=True, tenant=tenant)
        if dry_run or not planned or not json:
            _print_removals(planned, json=json)
        if dry_run or not planned:
            return
        if not yes:
            confirm(f"This deletes {counted(len(planned), 'version')}.", "yes")
        removed = client.adapters.prune(tenant=tenant)
    if json:
        print_json(removed)
    size = rounded_size(sum(each.bytes for each in removed))
    print_message(f"{counted(len(removed), 'version')} removed; the clean-up frees {size} in an hour or two.")


def _print_removals(removals: Sequence[Removal], *, json: bool) -> None:
    if json:
        return print_json(removals)
    return print_table(
        ("ADAPTER", "VERSION", "KIND", "SIZE", "CREATED", "REASON"),
        (
            (
                each.adapter,
                short_version(each.version),
                each.kind,
                rounded_size(each.bytes),
                time_ago(each.created_at),
                each.reason,
            )
            for each in removals
        ),
        empty=_NOTHING,
    )
