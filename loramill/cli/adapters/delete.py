"""`loramill adapters delete`: delete adapters, or single versions."""

from __future__ import annotations

from typing import Annotated

import typer

from loramill.cli import complete
from loramill.cli.arguments import CancelJobsFlag, JsonFlag, YesFlag
from loramill.cli.confirm import confirm, describe_deletion, summarize_deletion
from loramill.cli.format import print_json, print_message
from loramill.client import Client
from loramill.names import AdapterName
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
Force = Annotated[
    bool, typer.Option("--force", help="Delete a version even if it is the challenger or the previous champion.")
]


def delete_adapters(
    models: Models,
    yes: YesFlag = False,
    cancel_jobs: CancelJobsFlag = False,
    force: Force = False,
    json: JsonFlag = False,
) -> None:
    """Delete adapters with their versions, jobs and history, or single versions. Uploaded files are kept."""
    split = [(AdapterName.parse(model.partition("@")[0]), model.partition("@")[2]) for model in models]
    removed: list[DeletionSummary] = []
    with Client() as client:
        # All must exist before any is deleted.
        found = [client.adapters.get(str(name)) for name, _ in split]
        if not yes:
            confirm(
                describe_deletion([f"{a.name}@{v}" if v else a.name for a, (_, v) in zip(found, split, strict=True)]),
                "yes",
            )
        for name, version in split:
            if version:
                client.adapters.delete_version(str(name), version, force=force)
                removed.append(DeletionSummary(versions=1))
            else:
                removed.append(client.adapters.delete(str(name), cancel_jobs=cancel_jobs))
            if not json:
                print_message(
                    f"{name.at(version)} is deleted." if version else summarize_deletion(str(name), removed[-1])
                )
    if json:
        print_json(removed)
