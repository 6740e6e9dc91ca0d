"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loramill.cli import complete

AdapterArgument = Annotated[
    str,
    typer.Argument(
        metavar="TENANT/ADAPTER",
        help="Name of the adapter, such as acme/support.",
        show_default=False,
        autocompletion=complete.adapters,
    ),
]
AdapterVersionArgument = Annotated[
    str,
    typer.Argument(
        metavar="TENANT/ADAPTER[@VERSION]",
        help="Adapter and version, such as acme/support@3f2a9c01. The version is an alias, or at least the first 8 "
        "digits of a hash.",
        show_default=False,
        autocompletion=complete.adapters,
    ),
]
VersionArgument = Annotated[
    str | None,
    typer.Argument(metavar="[VERSION]", help="Version, if not part of the first argument.", show_default=False),
]
FolderOption = Annotated[Path, typer.Option("--to", metavar="FOLDER", help="Folder to create.", show_default=False)]

JobArgument = Annotated[
    str,
    typer.Argument(
        metavar="JOB",
        help="ID of the job (ftjob-…), or its first digits.",
        show_default=False,
        autocompletion=complete.jobs,
    ),
]
JobsArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="JOB…",
        help="IDs of jobs (ftjob-…), or their first digits.",
        show_default=False,
        autocompletion=complete.jobs,
    ),
]
JobLimitOption = Annotated[int, typer.Option("--limit", "-n", min=1, help="Maximum number of jobs, newest first.")]

TenantArgument = Annotated[
    str,
    typer.Argument(metavar="TENANT", help="Name of the tenant.", show_default=False, autocompletion=complete.tenants),
]
TenantOption = Annotated[
    str | None,
    typer.Option(
        "--tenant",
        metavar="TENANT",
        help="Limit the command to this tenant (for an admin's key).",
        autocompletion=complete.tenants,
    ),
]

_TRAIN_HELP = "Examples to train on: JSONL, JSON, CSV, TSV, Parquet, Arrow, hf:org/name, or an uploaded file's ID."
TrainOption = Annotated[str, typer.Option("--train", metavar="FILE", help=_TRAIN_HELP, show_default=False)]
OptionalTrainOption = Annotated[str | None, typer.Option("--train", metavar="FILE", help=_TRAIN_HELP)]
ValidOption = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="Examples to measure the validation loss on, in the same formats as --train."),
]
ColumnsOption = Annotated[
    str | None,
    typer.Option(
        metavar="LIST",
        help="Column of each field, such as prompt=question,completion=answer. Default: detected for messages, "
        "prompt and completion, Alpaca and ShareGPT columns.",
    ),
]
ValidColumnsOption = Annotated[
    str | None,
    typer.Option(metavar="LIST", help="Columns of --valid, if they differ from --columns and are not detected."),
]

JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON to stdout and nothing else.")]
YesFlag = Annotated[bool, typer.Option("--yes", "-y", help="Delete without confirmation.")]
CancelJobsFlag = Annotated[
    bool, typer.Option("--cancel-jobs", help="Cancel unfinished jobs; otherwise they prevent the deletion.")
]
