"""`adapters delete`, `adapters rename` and `tenant delete`; a deletion is confirmed first."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from loramill.cli import complete
from loramill.cli.format import JsonFlag, print_json, print_message
from loramill.client import Client
from loramill.names import AdapterName
from loramill.plural import counted
from loramill.types import DeletionSummary

Models = Annotated[
    list[str],
    typer.Argument(
        metavar="TENANT/ADAPTER[@VERSION]…",
        help="Adapters, or single versions, to delete.",
        show_default=False,
        autocompletion=complete.adapters,
    ),
]
Tenants = Annotated[
    list[str],
    typer.Argument(metavar="TENANT…", help="Tenants to delete.", show_default=False, autocompletion=complete.tenants),
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Delete without confirmation.")]
CancelJobs = Annotated[
    bool, typer.Option("--cancel-jobs", help="Cancel unfinished jobs; otherwise they prevent the deletion.")
]
Force = Annotated[
    bool, typer.Option("--force", help="Delete a version even if it is the challenger or the previous champion.")
]


def delete_adapters(
    models: Models, yes: Yes = False, cancel_jobs: CancelJobs = False, force: Force = False, json: JsonFlag = False
) -> None:
    """Delete adapters with their versions, jobs and history, or single versions. Uploaded files are kept."""
    split = [(AdapterName.parse(model.partition("@")[0]), model.partition("@")[2]) for model in models]
    removed: list[DeletionSummary] = []
    with Client() as client:
        # All must exist before any is deleted.
        found = [client.adapters.get(str(name)) for name, _ in split]
        if not yes:
            _confirm(
                _consequence([f"{a.name}@{v}" if v else a.name for a, (_, v) in zip(found, split, strict=True)]), "yes"
            )
        for name, version in split:
            if version:
                client.adapters.delete_version(str(name), version, force=force)
                removed.append(DeletionSummary(versions=1))
            else:
                removed.append(client.adapters.delete(str(name), cancel_jobs=cancel_jobs))
            if not json:
                print_message(f"{name.at(version)} is deleted." if version else _summary(str(name), removed[-1]))
    if json:
        print_json(removed)


def rename_adapter(
    name: Annotated[
        str,
        typer.Argument(
            metavar="TENANT/ADAPTER",
            help="Current name of the adapter.",
            show_default=False,
            autocompletion=complete.adapters,
        ),
    ],
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


def delete_tenants(names: Tenants, yes: Yes = False, cancel_jobs: CancelJobs = False, json: JsonFlag = False) -> None:
    """Delete tenants with their keys, files, jobs and adapters. Usage and audit entries lose their names."""
    removed: list[DeletionSummary] = []
    with Client() as client:
        for name in names:
            client.tenants.get(name)
        if not yes:
            _confirm(_consequence(names), names[0] if len(names) == 1 else "yes")
        for name in names:
            removed.append(client.tenants.delete(name, cancel_jobs=cancel_jobs))
            if not json:
                print_message(_summary(f"Tenant {name}", removed[-1]))
    if json:
        print_json(removed)


def _consequence(names: Sequence[str]) -> str:
    return f"This deletes {', '.join(names)} with everything that belongs to {'them' if len(names) > 1 else 'it'}."


def _confirm(sentence: str, expected: str) -> None:
    """Requires the user to type a word, and exits otherwise."""
    if not _is_interactive():
        raise typer.BadParameter("the deletion can't be confirmed without a terminal; use --yes.")
    print_message(f"{sentence} It can't be undone.", style="yellow")
    if typer.prompt(f"Type {expected} to delete", default="", show_default=False, err=True) != expected:
        print_message("Nothing was deleted.")
        raise typer.Exit(1)


def _is_interactive() -> bool:
    return sys.stdin.isatty()


def _summary(name: str, removed: DeletionSummary) -> str:
    counts = ((removed.versions, "version"), (removed.jobs, "job"), (removed.files, "file"))
    parts = [counted(count, what) for count, what in counts if count]
    open_jobs = len(removed.cancelled)
    ended = f" {counted(open_jobs, 'job')} had not ended and {'was' if open_jobs == 1 else 'were'} cancelled."
    return (f"{name} is deleted, with {', '.join(parts)}." if parts else f"{name} is deleted.") + ended * bool(
        open_jobs
    )
