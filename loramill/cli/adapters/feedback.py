"""`loramill feedback`: ratings and corrections of stored completions."""

from __future__ import annotations

from typing import Annotated

import typer

from loramill.cli import complete
from loramill.cli.arguments import JsonFlag, TenantOption, YesFlag
from loramill.cli.confirm import confirm
from loramill.cli.format import (
    escape_control_characters,
    print_json,
    print_line,
    print_message,
    print_table,
    short_version,
    time_ago,
)
from loramill.client import Client
from loramill.plural import counted, listed
from loramill.types import CompletionDeletion

AdapterOption = Annotated[
    str | None,
    typer.Option(
        "--adapter",
        metavar="TENANT/ADAPTER",
        help="Only answers of this adapter.",
        autocompletion=complete.adapters,
    ),
]
UserOption = Annotated[
    str | None, typer.Option("--user", metavar="USER", help="Only answers to this `user` of the requests.")
]


def list_feedback(
    adapter: AdapterOption = None,
    user: UserOption = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="Maximum number, newest first.")] = 20,
    tenant: TenantOption = None,
    json: JsonFlag = False,
) -> None:
    """List ratings and corrections, without the texts of requests and answers."""
    with Client() as client:
        found = client.feedback.list(adapter=adapter, user=user, limit=limit, tenant=tenant)
    if json:
        return print_json(found)
    return print_table(
        ("COMPLETION", "ANSWER", "MODEL", "VERSION", "RATING", "CORRECTED", "REASON", "GIVEN"),
        (
            (
                each.completion_id,
                str(each.choice),
                each.model,
                short_version(each.version),
                each.rating or "-",
                "yes" if each.correction is not None else "no",
                escape_control_characters(each.reason or "-"),
                time_ago(each.updated_at),
            )
            for each in found
        ),
        empty="No feedback yet: `POST /v1/feedback` rates a completion that was requested with `store: true`.",
    )


def export_feedback(adapter: AdapterOption = None, user: UserOption = None, tenant: TenantOption = None) -> None:
    """Print feedback with the requests and answers that it is about, one JSON object per line."""
    with Client() as client:
        for each in client.feedback.list(adapter=adapter, user=user, texts=True, tenant=tenant):
            print_line(each.model_dump_json())


def delete_feedback(
    completion: Annotated[
        str | None, typer.Option(metavar="ID", help="Delete the feedback on this completion, which itself stays.")
    ] = None,
    user: Annotated[
        str | None,
        typer.Option(metavar="USER", help="Delete all stored completions of this `user`, with their feedback."),
    ] = None,
    tenant: Annotated[
        str | None,
        typer.Option(
            metavar="TENANT", help="Tenant of the user (for an admin's key).", autocompletion=complete.tenants
        ),
    ] = None,
    yes: YesFlag = False,
    json: JsonFlag = False,
) -> None:
    """Delete the feedback on a completion, or all stored completions of a user."""
    if (completion is None) == (user is None):
        raise typer.BadParameter("give either --completion ID or --user USER.")
    if not yes:
        confirm(f"This deletes the feedback on {completion}." if completion else "This deletes the user's data.", "yes")
    with Client() as client:
        removed = (
            client.feedback.delete(completion) if completion else client.feedback.delete_user(user or "", tenant=tenant)
        )
    if json:
        print_json(removed)
    else:
        print_message(_summary(removed))


def _summary(removed: CompletionDeletion) -> str:
    kept = ""
    if removed.files:
        kept = f" Examples of it stay in {listed(removed.files)}, which a nightly run has used."
    completions, answers = counted(removed.completions, "completion"), counted(removed.feedback, "answer")
    return f"Deleted {completions}, and the feedback on {answers}.{kept}"
