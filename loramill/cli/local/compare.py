"""`loramill compare`: fine-tuning methods, measured side by side on the user's own data."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from loramill.cli.format import make_console, print_line, print_message, print_table
from loramill.cli.model_options import option_help
from loramill.errors import InvalidRequest
from loramill.settings import Settings
from loramill.types import JobSpec

Stage = Any  # loramill.pipelines.compare's; the CLI imports higher layers only inside functions

METHODS = "full,lora,qlora,dora,adalora,prefix,bottleneck"


def compare(
    train: Annotated[Path, typer.Option(metavar="FILE", exists=True, dir_okay=False, help="Examples to train on.")],
    valid: Annotated[
        Path,
        typer.Option(metavar="FILE", exists=True, dir_okay=False, help="Examples to choose the best weights by."),
    ],
    test: Annotated[
        Path,
        typer.Option(metavar="FILE", exists=True, dir_okay=False, help="Examples to score the trained models on."),
    ],
    base: Annotated[
        str | None, typer.Option(help=f"{option_help(Settings, 'base')} Default: the base of the settings.")
    ] = None,
    methods: Annotated[str, typer.Option(metavar="LIST", help="Methods to measure, in this order.")] = METHODS,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps. Default: as for a job.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help=f"{option_help(JobSpec, 'batch_size')} Default: as for a job.")
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(
            min=1, max=256, help="Rank of LoRA; prefix and bottleneck sizes follow it. Default: as for a job."
        ),
    ] = None,
    rate: Annotated[
        list[str] | None, typer.Option(metavar="METHOD=RATE", help="Learning rate of one method (repeatable).")
    ] = None,
    seed: Annotated[int, typer.Option(help="Random seed; the same seed gives the same weights.")] = 0,
    json: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", dir_okay=False, help="Write all results to this file as JSON."),
    ] = None,
    chart: Annotated[
        Path | None,
        typer.Option(metavar="FILE.png", dir_okay=False, help="Plot quality against cost in this PNG file."),
    ] = None,
) -> None:
    """Fine-tune with each method on the same examples, and compare cost and quality on this machine.

    The methods run one after another, each in its own process. Exits with 1 if a method failed, after printing the
    results of the others.
    """
    from loramill.pipelines.compare.report.chart import save_chart
    from loramill.pipelines.compare.run import compare_all, plan_tasks
    from loramill.pipelines.compare.types import ComparisonOptions

    settings = Settings.load()
    _check_writable(json, chart)
    options = ComparisonOptions(
        methods=tuple(methods.split(",")),
        rates=tuple(rate or ()),
        base=base or settings.base,
        train=train,
        valid=valid,
        test=test,
        steps=steps,
        batch_size=batch_size,
        rank=rank,
        seed=seed,
    )
    with tempfile.TemporaryDirectory(prefix="loramill-compare-") as folder:
        with make_console(stderr=True).status("Reading the data…"):
            tasks = plan_tasks(settings, Path(folder), options)
        comparison = compare_all(tasks, _progress)
    if json is not None:
        json.write_text(comparison.model_dump_json(indent=2) + "\n", encoding="utf-8")
    if chart is not None and any(row.training for row in comparison.rows):
        save_chart(comparison, chart)
    _print_comparison(comparison)
    if any(row.error for row in comparison.rows):
        raise typer.Exit(1)


def _print_comparison(comparison: Any) -> None:
    from loramill.pipelines.compare.report import table

    print_table(table.TRAINING, table.training_rows(comparison), empty="Nothing was trained.")
    print_line("")
    print_table(table.RESULT, table.result_rows(comparison), empty="Nothing was answered.")
    print_line("")
    for note in table.notes(comparison):
        print_message(note, style="dim")
    for failure in table.failures(comparison):
        print_message(failure, style="red")


def _check_writable(*files: Path | None) -> None:
    """Checks the output files before anything is measured."""
    for file in files:
        if file is not None and not file.parent.is_dir():
            raise InvalidRequest(f"{file} can't be written: name a file in an existing folder.")


@contextmanager
def _progress(title: str) -> Iterator[Callable[[Stage], None]]:
    """Shows the progress of one method; yields a callback for its stages."""
    columns = (
        TextColumn("{task.description:<20}"),
        BarColumn(),
        TextColumn("{task.fields[stage]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=make_console(stderr=True), redirect_stdout=False) as progress:
        line = progress.add_task(title, total=None, stage="starting")

        def on_stage(stage: Stage) -> None:
            progress.update(line, stage=stage.name, completed=stage.done, total=stage.total)

        yield on_stage
        progress.update(line, stage="done", completed=1, total=1)
