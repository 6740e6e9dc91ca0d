"""`loramill nightly approve`: a person decides about challengers that passed the gate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from loramill.cli import complete
from loramill.cli.arguments import JsonFlag
from loramill.cli.format import print_json, print_message, short_version
from loramill.cli.nightly_registry import open_registry
from loramill.errors import LoramillError

if TYPE_CHECKING:
    from loramill.registry import Registry
    from loramill.types import Approval

#: What the registry records in place of an API key.
BY = "command line"


def approve(
    run: Annotated[str, typer.Argument(metavar="RUN", help="ID of the run.", show_default=False)],
    adapters: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="TENANT/ADAPTER",
            help="Adapters whose challengers wait.",
            show_default=False,
            autocompletion=complete.adapters,
        ),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="All adapters of the run that wait.")] = False,
    reject: Annotated[bool, typer.Option("--reject", help="Drop the challengers instead.")] = False,
    reason: Annotated[
        str, typer.Option(metavar="TEXT", help="Why; the report of the run shows it.", show_default=False)
    ] = "",
    json: JsonFlag = False,
) -> None:
    """Approve challengers that passed the gate of a nightly run with `gate.approval: manual`, or reject them.

    They take over as nightly.yaml specified during the run: at once, or after a canary or shadow. Exits with 1 if one
    could not be decided; the others are decided nevertheless.
    """
    from loramill.registry.nightly import get_run
    from loramill.registry.nightly_approvals import list_waiting

    if every == bool(adapters):
        raise typer.BadParameter("name adapters, such as acme/support, or give --all, and not both.")
    _, registry = open_registry()
    if every:
        with registry.reading() as session:
            adapters = [each.adapter for each in list_waiting(session, run=get_run(session, run).id)]
    decided, failed = [], False
    for name in adapters or ():
        try:
            decided.append(decide(registry, run, name, reject=reject, note=reason))
        except LoramillError as error:
            failed = True
            print_message(error.message, style="red")
        else:
            if not json:
                print_message(_outcome(decided[-1], _champion(registry, name), reject=reject))
    if json:
        print_json(decided)
    elif not adapters:
        print_message(f"Nothing of {run} waits for approval.")
    if failed:
        raise typer.Exit(1)


def print_waiting(waiting: Sequence[Approval]) -> None:
    """Prints what waits for approval, with the command for each."""
    for each in waiting:
        print_message(
            f"{each.adapter}: {short_version(each.version)} waits for approval; "
            f"`loramill nightly approve {each.run} {each.adapter}` promotes it, with --reject it is dropped.",
            style="yellow",
        )


def decide(registry: Registry, run: str, name: str, *, reject: bool, note: str) -> Approval:
    """Approves or rejects, with its entry in the audit."""
    from loramill.names import AdapterName
    from loramill.registry import audit, nightly_approvals

    adapter = AdapterName.parse(name)
    decide = nightly_approvals.reject if reject else nightly_approvals.approve
    with registry.writing() as session:
        decided = decide(session, run, adapter, by=BY, note=note)
        audit.record(
            session,
            tenant=adapter.tenant,
            actor=None,
            key=BY,
            action=f"adapter.{'reject' if reject else 'approve'}",
            subject=name,
            request=run,
            version=decided.version,
        )
    return decided


def _champion(registry: Registry, name: str) -> str | None:
    from loramill.registry import adapters

    with registry.reading() as session:
        return adapters.get(session, name).champion


def _outcome(decided: Approval, champion: str | None, *, reject: bool) -> str:
    version, name, how = short_version(decided.version), decided.adapter, decided.introduction
    if reject:
        return f"{name}: {version} is rejected; its champion stays."
    if champion == decided.version:
        return f"{name} now answers with {version}."
    copies = "copies of " if how.shadow else ""
    return f"{name}: {version} answers {copies}{how.share:.0%} of the requests, and is promoted unless it is worse."
