"""`loramill tenant delete`."""

from __future__ import annotations

from typing import Annotated

import typer

from loramill.cli import complete
from loramill.cli.arguments import CancelJobsFlag, JsonFlag, YesFlag
from loramill.cli.confirm import confirm, describe_deletion, summarize_deletion
from loramill.cli.format import print_json, print_message
from loramill.client import Client
from loramill.types import DeletionSummary

Tenants = Annotated[
    list[str],
    typer.Argument(metavar="TENANT…", help="Tenants to delete.", show_default=False, autocompletion=complete.tenants),
]


def delete_tenants(
    names: Tenants, yes: YesFlag = False, cancel_jobs: CancelJobsFlag = False, json: JsonFlag = False
) -> None:
    """Delete tenants with their keys, files, jobs and adapters. Usage and audit entries stay without their names."""
    removed: list[DeletionSummary] = []
    with Client() as client:
        for name in names:
            client.tenants.get(name)
        if not yes:
            confirm(describe_deletion(names), names[0] if len(names) == 1 else "yes")
        for name in names:
            removed.append(client.tenants.delete(name, cancel_jobs=cancel_jobs))
            if not json:
                print_message(summarize_deletion(f"Tenant {name}", removed[-1]))
    if json:
        print_json(removed)
