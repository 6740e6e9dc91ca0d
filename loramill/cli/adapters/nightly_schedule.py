"""`loramill nightly validate`, `plan`, `status` and `history`: the definition of nightly runs and their schedule."""

from __future__ import annotations

import time
from json import dumps
from pathlib import Path
from typing import Annotated

import typer

from loramill.cli.adapters.nightly_approve import print_waiting
from loramill.cli.adapters.rollouts import print_rollouts
from loramill.cli.arguments import JsonFlag
from loramill.cli.format import (
    local_minute,
    print_fields,
    print_json,
    print_line,
    print_message,
    print_table,
    styled_status,
    time_ago,
)
from loramill.cli.nightly_registry import open_registry
from loramill.durations import rounded_duration
from loramill.errors import DefinitionInvalid, SetupError
from loramill.plural import counted


def validate(
    file: Annotated[
        Path | None,
        typer.Argument(
            metavar="FILE", help="File to check. Default: that of the setting nightly.file.", show_default=False
        ),
    ] = None,
) -> None:
    """Check nightly.yaml, and print what it means. Exits with 1 if it has faults.

    It prints all faults of keys and values at once, or else all contradictions between sections. It works without a
    database, but then can't show which adapters the file selects.
    """
    from loramill.pipelines.nightly.definition import load_definition, read_definition
    from loramill.pipelines.nightly.definition.describe import describe
    from loramill.pipelines.nightly.schedule.overview import coming_times
    from loramill.settings import Settings

    settings = Settings.load()
    try:
        definition = load_definition(settings) if file is None else read_definition(file)
    except DefinitionInvalid as error:
        for problem in error.problems or (error.message,):
            print_message(problem, style="red")
        raise typer.Exit(1) from error
    path = settings.nightly_file if file is None else file
    print_message(f"{path} is valid." if path.exists() else f"{path} does not exist; these are the defaults.")
    print_fields(describe(definition, _adapter_names(), coming_times(definition.schedule, time.time())))


def _adapter_names() -> list[str] | None:
    """The names of all adapters; None without a database."""
    from loramill.registry import adapters

    try:
        _, registry = open_registry()
    except SetupError as error:
        print_message(f"The adapters are not listed: {error.message}")
        return None
    with registry.reading() as session:
        return [each.name for each in adapters.list_adapters(session, None)]


def plan(json: JsonFlag = False) -> None:
    """Show what the next nightly run does with the new data of each adapter, and when it starts."""
    from loramill.pipelines.nightly.definition import load_definition
    from loramill.pipelines.nightly.schedule.overview import coming_times
    from loramill.registry.nightly import new_data_state, pending_data

    settings, registry = open_registry()
    definition = load_definition(settings)
    with registry.reading() as session:
        states = []
        for data in pending_data(session):
            rules, minimum = definition.for_adapter(data.adapter), settings.jobs.min_examples
            replay, held_out = rules.replay.plain_examples, rules.split.held_out
            states.append(new_data_state(session, data.adapter, minimum, replay=replay, held_out=held_out))
    coming = coming_times(definition.schedule, time.time(), 1)
    if json:
        listed = [each.model_dump() | {"included": definition.includes(each.adapter)} for each in states]
        return print_line(dumps({"next": coming[0] if coming else None, "adapters": listed}, indent=2))
    rows = []
    for each in states:
        included = definition.includes(each.adapter)
        word = "excluded" if not included else "trains" if each.enough else "waits"
        rows.append((each.adapter, styled_status(word), each.outlook if included else "nightly.yaml leaves it out."))
    print_table(("ADAPTER", "PLAN", ""), rows, empty="No adapter has new data: the next run does nothing.")
    print_message(f"The next run starts at {coming[0]}." if coming else "`loramill nightly run` starts a run.")
    return None


def status(json: JsonFlag = False) -> None:
    """Show the schedule, faults of nightly.yaml, how far the newest run is, rollouts, and what waits for approval."""
    from loramill.pipelines.nightly.schedule.overview import schedule_overview

    settings, registry = open_registry()
    found = schedule_overview(registry, settings)
    if json:
        return print_json(found)
    run = found.run
    pairs = [
        ("file", found.file if found.exists else f"{found.file} (does not exist)"),
        ("schedule", found.schedule or "none"),
        ("next", ", ".join(found.next_times) or "-"),
        ("due", found.due),
    ]
    if run is not None:
        stages = ", ".join(f"{counted(count, 'adapter')} at {stage}" for stage, count in run.stages.items())
        pairs += [
            ("newest run", f"{run.id}, {run.state}, began {time_ago(run.began_at)}"),
            ("finished", stages or "no adapter"),
            ("result", run.summary),
        ]
        if run.state == "running" and run.silent_seconds is not None:
            pairs.append(("process", f"{run.holder}, last heartbeat {rounded_duration(run.silent_seconds)} ago"))
    print_fields(pairs)
    print_rollouts(found.rollouts)
    print_waiting(found.approvals)
    for problem in found.problems:
        print_message(problem, style="red")
    if found.problems:
        print_message("While the file has faults, a running schedule keeps its last good state.", style="red")
    return None


def history(
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="Maximum number of runs, newest first.")] = 20,
    json: JsonFlag = False,
) -> None:
    """List the last nightly runs, with what started them and how they ended."""
    from loramill.pipelines.nightly.schedule.overview import list_overviews

    _, registry = open_registry()
    found = list_overviews(registry, limit)
    if json:
        return print_json(found)
    rows = [
        (
            each.id,
            local_minute(each.began_at),
            rounded_duration((each.finished_at or time.time()) - each.began_at),
            "schedule" if each.scheduled_at else "hand",
            styled_status(each.state),
            each.summary,
        )
        for each in found
    ]
    return print_table(
        ("RUN", "BEGAN", "TOOK", "BY", "STATE", "RESULT"), rows, empty="There has been no nightly run yet."
    )
