"""`loramill compare`: the ways to fine-tune, measured side by side on the user's own data."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from loramill.cli.format import make_console, print_line, print_message, print_table

Stage = Any  # of loramill.pipelines.compare, to which the door opens only inside functions

METHODS = "full,lora,qlora,dora,adalora,prefix,bottleneck"


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command(rich_help_panel="This machine")(compare)


def compare(
    train: Annotated[Path, typer.Option(metavar="FILE", exists=True, dir_okay=False, help="Examples to learn.")],
    valid: Annotated[
        Path,
        typer.Option(metavar="FILE", exists=True, dir_okay=False, help="Examples by which the best weights are kept."),
    ],
    test: Annotated[
        Path, typer.Option(metavar="FILE", exists=True, dir_okay=False, help="Examples whose answers are judged.")
    ],
    base: Annotated[str | None, typer.Option(help="Name, folder or hub id; by default the setting's.")] = None,
    methods: Annotated[str, typer.Option(help="Those to measure, in this order.")] = METHODS,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps; by default as a job's.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Examples a step; by default as a job's.")] = None,
    rank: Annotated[
        int | None,
        typer.Option(min=1, max=256, help="Of LoRA; prefix and bottleneck grow with it. By default as a job's."),
    ] = None,
    rate: Annotated[list[str] | None, typer.Option(metavar="METHOD=RATE", help="A method's learning rate.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed, the same weights.")] = 0,
    json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", dir_okay=False, help="Write everything there.")
    ] = None,
    chart: Annotated[
        Path | None, typer.Option(metavar="FILE.png", dir_okay=False, help="Draw quality against cost there.")
    ] = None,
) -> None:
    """Fine-tune by each method on the same examples, and show what that costs and comes to on this machine.

    Each method runs in a process of its own, one after another. Exits with 1 if one failed, after the others' results.
    """
    from loramill.pipelines.compare.report.chart import save_chart
    from loramill.pipelines.compare.run import compare_all, plan_tasks
    from loramill.settings import Settings

    settings = Settings.load()
    _check_writable(json, chart)
    with tempfile.TemporaryDirectory(prefix="loramill-compare-") as folder:
        with make_console(stderr=True).status("Reading the data…"):
            tasks = plan_tasks(
                settings,
                Path(folder),
                methods=methods.split(","),
                rates=rate or (),
                base=base or settings.base,
                train=train,
                valid=valid,
                test=test,
                steps=steps,
                batch_size=batch_size,
                rank=rank,
                seed=seed,
            )
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
    """Refuses what would fail only after all was measured."""
    from loramill.errors import InvalidRequest

    for file in files:
        if file is not None and not file.parent.is_dir():
            raise InvalidRequest(f"{file} can't be written: name a file in a folder that is there.")


@contextmanager
def _progress(title: str) -> Iterator[Callable[[Stage], None]]:
    """A line for one method; yields what hears its stages."""
    columns = (
        TextColumn("{task.description:<20}"),
        BarColumn(),
        TextColumn("{task.fields[stage]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=make_console(stderr=True), redirect_stdout=False) as progress:
        line = progress.add_task(title, total=None, stage="starting")

        def hear(stage: Stage) -> None:
            progress.update(line, stage=stage.name, completed=stage.done, total=stage.total)

        yield hear
        progress.update(line, stage="done", completed=1, total=1)
