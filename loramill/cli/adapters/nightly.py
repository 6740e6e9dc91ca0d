"""`loramill nightly`: retrain adapters that have new data, and promote the measurably better versions."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from loramill.cli import complete
from loramill.cli.adapters.nightly_approve import print_waiting
from loramill.cli.adapters.rollouts import print_rollouts
from loramill.cli.arguments import AdapterArgument, JsonFlag
from loramill.cli.format import (
    Cell,
    escape_control_characters,
    make_console,
    print_line,
    print_message,
    print_table,
    styled_status,
)
from loramill.cli.nightly_registry import open_registry
from loramill.errors import LeaseLost, LoramillError, NightlyBusy, first_lines
from loramill.names import AdapterName
from loramill.plural import counted

if TYPE_CHECKING:
    from loramill.registry import Registry
    from loramill.types import NightlyRun, NightlyStep


#: For commands about the newest run with work to do when there is none; `history` may list runs that had none.
NO_RUN = "No nightly run has had new data yet; `loramill data add` adds some, and `loramill nightly run` starts a run."


def run(
    report_file: Annotated[
        Path | None,
        typer.Option(
            "--report",
            metavar="FILE",
            help="Where to write the report, an HTML page. Default: a folder of the run in `home`.",
            show_default=False,
        ),
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Retrain every adapter that has new data, or resume an interrupted run.

    Exits with 0 if nothing failed, and with 1 if an adapter failed or the run was interrupted. If another process works
    on the run, this one leaves it to that process and exits with 0.
    """
    from loramill.pipelines.nightly.outcome import succeeded
    from loramill.pipelines.nightly.report.publish import PublishedReport, publish_run
    from loramill.pipelines.nightly.run import run_nightly

    settings, registry = open_registry()
    reported: list[NightlyStep] = []
    published: list[PublishedReport] = []
    stopped: LoramillError | None = None

    def publish(run: NightlyRun, deleted: Sequence[NightlyStep]) -> None:
        reason = None if stopped is None else stopped.message
        published.append(publish_run(registry, settings, run, deleted=deleted, interrupted=reason, file=report_file))

    with _progress(quiet=json) as (on_step, on_progress):

        def on_end(step: NightlyStep) -> None:
            reported.append(step)
            on_step(step)

        try:
            nightly_run = run_nightly(registry, settings, report=on_end, publish=publish, progress=on_progress)
        except NightlyBusy as error:
            print_message(error.message, style="yellow")
            raise typer.Exit(0) from error
        except LoramillError as error:
            unfinished = _last_run(registry)
            if unfinished is None or unfinished.finished_at is not None:
                raise
            stopped, nightly_run = error, unfinished
    deleted = [step for step in reported if step.result.get("deleted")]
    # A run that has lost its lease is reported by the process that has taken it over.
    if nightly_run.finished_at is None and not isinstance(stopped, LeaseLost):
        publish(nightly_run, deleted)
    for each in published:
        for problem in each.problems:
            print_message(problem, style="yellow")
        if each.page is not None and not json:
            print_message(f"Report: {each.page}")
    found = _print_run(registry, nightly_run, json, deleted)
    if stopped is not None and not json:
        print_message(stopped.message, style="red")
    unread = nightly_run.sources is not None and nightly_run.sources.problems
    if stopped is not None or unread or not succeeded(found):
        raise typer.Exit(1)


def show_run(
    run_id: Annotated[
        str | None,
        typer.Argument(
            metavar="RUN", help="ID of the run. Default: the last one that had work to do.", show_default=False
        ),
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Show the scores, decisions and reasons of a nightly run, and its rollouts."""
    from loramill.registry.nightly import get_run

    _, registry = open_registry()
    if run_id is None:
        nightly_run = _last_run(registry)
    else:
        with registry.reading() as session:
            nightly_run = get_run(session, run_id)
    if nightly_run is not None:
        _print_run(registry, nightly_run, json)
    elif json:
        print_line(dumps(None))
    else:
        print_message(NO_RUN)


def show_data(json: JsonFlag = False) -> None:
    """List the new data for the next nightly run, and the data that was set aside after a failure."""
    from loramill.registry.nightly import list_set_aside, new_data_state, pending_data

    settings, registry = open_registry()
    with registry.reading() as session:
        ready = [new_data_state(session, each.adapter, settings.jobs.min_examples) for each in pending_data(session)]
        aside = list_set_aside(session)
    if json:
        dumped = {"waiting": [each.model_dump() for each in ready], "set_aside": [each.model_dump() for each in aside]}
        return print_line(dumps(dumped, indent=2))
    rows = [(each.adapter, styled_status("waiting"), each.outlook) for each in ready]
    for each in aside:
        files = ", ".join((*each.train, *each.valid))
        rows.append((each.adapter, styled_status("set aside"), f"{each.stage}: {first_lines(each.reason)} ({files})"))
    return print_table(("ADAPTER", "STATE", ""), rows, empty="No adapter has new data.")


def retry(
    name: Annotated[
        str,
        typer.Argument(
            metavar="TENANT/ADAPTER|RUN",
            help="Adapter whose data was set aside, or ID of a run (nightly-…).",
            show_default=False,
            autocompletion=complete.adapters,
        ),
    ],
    stage: Annotated[
        Literal["train", "evaluate", "gate", "promote"] | None,
        typer.Option("--from", help="With a run: the first stage to repeat.", show_default=False),
    ] = None,
) -> None:
    """Include data that was set aside in the next nightly run, or repeat the stages of a run from one of them on.

    The results of a run's earlier stages are kept.
    """
    from loramill.registry.nightly import retry as give_back
    from loramill.registry.nightly_again import reopen_run

    if (stage is None) == name.startswith("nightly-"):
        raise typer.BadParameter("give it with the ID of a run, and only then.", param_hint="--from")
    _, registry = open_registry()
    if stage is None:
        with registry.writing() as session:
            data = give_back(session, AdapterName.parse(name))
        return print_message(f"The next nightly run uses {_format_files(data.train + data.valid)} of {name} again.")
    from loramill.pipelines.nightly.context import STAGES

    with registry.writing() as session:
        adapters = reopen_run(session, name, STAGES[STAGES.index(stage) :])
    return print_message(
        f"{counted(len(adapters), 'adapter')} of {name} will start again at {stage}: `loramill nightly run` does it."
    )


def backfill(
    since: Annotated[
        datetime,
        typer.Option(
            metavar="TIME",
            formats=["%Y-%m-%d", "%Y-%m-%dT%H:%M"],
            help="Time in UTC, such as 2026-06-01 or 2026-06-01T18:00.",
            show_default=False,
        ),
    ],
) -> None:
    """Include data that was added since a time in the next nightly run, although earlier runs have used it."""
    from loramill.registry.nightly_again import backfill as release_again

    _, registry = open_registry()
    with registry.writing() as session:
        found = release_again(session, since.replace(tzinfo=UTC).timestamp())
    files = sum(len(each.train) for each in found)
    print_message(f"The next nightly run uses {counted(files, 'file')} of {counted(len(found), 'adapter')}.")


def drop(name: AdapterArgument) -> None:
    """Remove an adapter's new data, waiting or set aside, from nightly runs. Its files are kept."""
    from loramill.registry.nightly import drop as forget

    _, registry = open_registry()
    with registry.writing() as session:
        data = forget(session, AdapterName.parse(name))
    print_message(f"Nightly runs no longer train {name} on {_format_files(data.train + data.valid)}.")


def _format_files(ids: Sequence[str]) -> str:
    return f"{len(ids)} file{'' if len(ids) == 1 else 's'} ({', '.join(ids)})"


def _last_run(registry: Registry) -> NightlyRun | None:
    from loramill.registry.nightly import last_run

    with registry.reading() as session:
        return last_run(session)


@contextmanager
def _progress(*, quiet: bool) -> Iterator[tuple[Callable[[NightlyStep], None], Callable[[Any], None]]]:
    """Yields callbacks for finished steps and for progress, shown as a bar per job and one for the answers."""
    from loramill.pipelines.nightly.outcome import describe

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[state]}"))
    console = make_console(stderr=True)
    bars: dict[str, TaskID] = {}
    with Progress(*columns, TimeElapsedColumn(), console=console, disable=quiet) as progress:

        def on_progress(now: Any) -> None:
            name = f"{now.stage} {now.adapter or 'all adapters'}"
            if name not in bars:
                bars[name] = progress.add_task(name, total=now.total, state=now.state)
            progress.update(bars[name], completed=now.done, total=now.total, state=now.state)

        def on_step(step: NightlyStep) -> None:
            if not quiet:
                console.print(escape_control_characters(describe(step)), soft_wrap=True)

        yield on_step, on_progress


def _print_run(
    registry: Registry, nightly_run: NightlyRun, json: bool, deleted: Sequence[NightlyStep] = ()
) -> list[Any]:
    """Prints a run with the outcome of each adapter; returns these outcomes.

    Args:
        registry: the registry of the run.
        nightly_run: the run.
        json: print JSON.
        deleted: steps of adapters that were deleted during the run.
    """
    from loramill.pipelines.nightly.outcome import outcomes, summary
    from loramill.pipelines.nightly.rollouts.overview import rollouts_around
    from loramill.registry.nightly import list_set_aside, list_steps
    from loramill.registry.nightly_approvals import list_waiting

    with registry.reading() as session:
        waiting = list_waiting(session, run=nightly_run.id)
        steps = [*list_steps(session, nightly_run.id), *deleted]
        aside = [each for each in list_set_aside(session) if each.run != nightly_run.id]
        rollouts = rollouts_around(session, nightly_run, time.time())
    found = outcomes(steps)
    if json:
        lists: dict[str, Sequence[Any]] = {"adapters": found, "rollouts": rollouts, "set_aside": aside, "steps": steps}
        lists["approvals"] = waiting
        dumped = {name: [each.model_dump(mode="json") for each in rows] for name, rows in lists.items()}
        print_line(dumps(nightly_run.model_dump(mode="json") | dumped, indent=2))
        return found
    if found:
        columns = ("ADAPTER", "METRIC", "BASE", "CHAMPION", "CHALLENGER", "DECISION", "REASON")
        print_table(columns, (outcome_row(each) for each in found), empty="")
    print_rollouts(rollouts)
    print_waiting(waiting)
    scan = nightly_run.sources
    for problem in scan.problems if scan is not None else ():
        print_message(f"{problem.url} could not be read: {first_lines(problem.reason)}", style="red")
    for url in scan.waiting if scan is not None else ():
        print_message(f"{url} may still be written: the next nightly run looks again.")
    for notes in filter(None, map(collection_notes, found)):
        print_message(notes)
    for each in aside:
        print_message(
            f"{each.adapter}: data of an earlier nightly run is set aside ({each.stage}: {first_lines(each.reason)}); "
            f"`loramill nightly retry {each.adapter}` uses it again, `loramill nightly drop {each.adapter}` "
            "discards it.",
            style="yellow",
        )
    print_message(summary(found))
    return found


def collection_notes(outcome: Any) -> str:
    """Returns what became of rows that an adapter's run does not use; empty if it uses all."""
    left_out = outcome.counts.describe()
    if not left_out:
        return ""
    reasons = "".join(f"\n  {first_lines(reason)}" for reason in outcome.quarantined)
    file = f"; all quarantined rows are in {outcome.quarantine}" if outcome.quarantine else ""
    return f"{outcome.adapter}: {left_out}{file}{':' if reasons else '.'}{reasons}"


def outcome_row(outcome: Any) -> tuple[Cell, ...]:
    """Returns the table row of an adapter; scores are means of the gate's metric over all its held-out examples."""
    scores = (outcome.base, outcome.champion, outcome.challenger)
    metric = "-" if all(score is None for score in scores) else outcome.metric.replace("_", " ")
    shown = ("-" if score is None else f"{score:.3f}" for score in scores)
    return (outcome.adapter, metric, *shown, styled_status(outcome.verdict), outcome.reason)
