"""`loramill plan`: the memory that a job needs, from the base's config.json alone."""

from __future__ import annotations

import json as encoding
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loramill.cli.arguments import JsonFlag
from loramill.cli.format import print_line, print_table
from loramill.cli.model_options import option_help, option_type, option_words, replace_keywords
from loramill.errors import DoesNotFit
from loramill.settings import Settings
from loramill.submission.options import drop_none
from loramill.submission.plan_options import PlanOptions

if TYPE_CHECKING:
    from loramill.submission.plan import JobPlan

#: The options of the command: fields of `PlanOptions`, and what the help calls their values.
_METAVARS = {
    "base": "BASE",
    "gpu": "GPU",
    "cpu": "SIZE",
    "per_gpu": None,
    "tenants": None,
    "method": "WORD",
    "objective": "WORD",
    "quantization": "WORD",
    "rank": None,
    "targets": "LIST",
    "layers": "LIST",
    "length": None,
    "batch_size": None,
    "answers": None,
    "micro_tokens": None,
    "gradient_checkpointing": None,
    "offload": "WORD",
}


def _option(name: str) -> Any:
    # Words are checked together with those of a spec file, so that both have the same error.
    kind = str if option_words(PlanOptions, name) else option_type(PlanOptions, name)
    option = typer.Option(metavar=_METAVARS[name], help=option_help(PlanOptions, name), show_default=False)
    return Annotated[kind | None, option]


def _with_plan_options(command: Callable[..., None]) -> Callable[..., None]:
    return replace_keywords(command, ((name, _option(name)) for name in _METAVARS))


@_with_plan_options
def plan(
    spec: Annotated[
        Path | None,
        typer.Argument(metavar="[SPEC]", help="TOML or JSON file with the options below and other options of a job."),
    ] = None,
    *,
    json: JsonFlag = False,
    **options: Any,
) -> None:
    """Show the memory that a job needs and the options that make it fit, from the base's config.json alone.

    Default device: the pool of the settings; if its size is unknown, no options are chosen. Exits with 1 if the job
    does not fit, and shows the nearest jobs that do.
    """
    from loramill.local.gpus import settings_of_pool
    from loramill.submission.plan import plan_job, read_plan_file

    if targets := options.get("targets"):
        options["targets"] = tuple(name.strip() for name in targets.split(","))
    try:
        found = plan_job((read_plan_file(spec) if spec else {}) | drop_none(options), settings_of_pool(Settings.load()))
    except DoesNotFit as error:
        if not json:
            raise
        print_line(encoding.dumps({"fits": False, "message": error.message, "nearest": error.nearest}, indent=2))
        raise typer.Exit(1) from error
    if json:
        print_line(encoding.dumps(_as_dict(found), indent=2))
    else:
        _print_plan(found)


def _as_dict(found: JobPlan) -> dict[str, Any]:
    sizing, known, session = found.sizing, found.device_known, found.session
    memory = sizing.memory if session is None else session.memory
    return {
        "fits": True if known else None,
        "bytes": memory.bytes,
        "budget": sizing.pool.budget_bytes if known else None,
        "sharers": sizing.sharers if known else None,
        "host_bytes": sizing.memory.host_bytes,
        "items": [asdict(item) for item in memory.items],
        "row_tokens": sizing.row.tokens,
        "passes": sizing.passes,
        "micro_tokens": sizing.spec.micro_tokens,
        "gradient_checkpointing": sizing.spec.gradient_checkpointing,
        "offload": sizing.spec.offload,
        "engine": found.engine,
        "session": None
        if session is None
        else {"tenants": session.tenants, "most": session.most, "next_bytes": session.next_bytes},
    }


def _print_plan(found: JobPlan) -> None:
    from loramill.sizing import format_bytes

    memory = found.sizing.memory if found.session is None else found.session.memory
    rows = [
        (item.name, format_bytes(item.bytes), f"{item.bytes / memory.bytes:.0%}", item.description)
        for item in memory.items
    ]
    print_table(("ITEM", "BYTES", "SHARE", ""), [*rows, ("total", format_bytes(memory.bytes), "100%", "")], empty="")
    if memory.host_bytes:
        print_line(f"Additional host memory: {format_bytes(memory.host_bytes)}.")
    if found.session is not None:
        print_line(found.session.explanation)
    elif found.device_known:
        print_line(found.sizing.explanation)
    else:
        device = "a GPU" if found.sizing.pool.device == "cuda" else "a CPU"
        print_line(f"These are the sizes on {device}. Give --gpu or --cpu to see whether the job fits.")
    if found.engine is not None:
        print_line(found.engine)
