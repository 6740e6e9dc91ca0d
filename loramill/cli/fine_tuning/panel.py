"""Adds the commands of the panel "Fine-tuning"."""

from __future__ import annotations

import typer

from loramill.cli.fine_tuning.files import delete_files, list_files, show_file
from loramill.cli.fine_tuning.jobs import cancel, checkpoints, events, list_jobs, pause, resume, retry, show_job
from loramill.cli.fine_tuning.plan import plan
from loramill.cli.fine_tuning.plot import plot
from loramill.cli.fine_tuning.submit import submit
from loramill.cli.fine_tuning.watch import watch
from loramill.cli.groups import ListByDefault

jobs = typer.Typer(cls=ListByDefault, help="List, watch and control fine-tune jobs. Default: list.")
files = typer.Typer(cls=ListByDefault, help="List, show and delete uploaded files of examples. Default: list.")


def add_fine_tuning_commands(app: typer.Typer) -> None:
    """Adds the commands to the root."""
    jobs.command("watch")(watch)
    jobs.command("plot")(plot)
    jobs.command("list")(list_jobs)
    jobs.command("show")(show_job)
    jobs.command("events")(events)
    jobs.command("checkpoints")(checkpoints)
    jobs.command("cancel")(cancel)
    jobs.command("pause")(pause)
    jobs.command("resume")(resume)
    jobs.command("retry")(retry)
    files.command("list")(list_files)
    files.command("show")(show_file)
    files.command("delete")(delete_files)
    app.command(rich_help_panel="Fine-tuning")(submit)
    app.command(rich_help_panel="Fine-tuning")(plan)
    app.add_typer(jobs, name="jobs", rich_help_panel="Fine-tuning")
    app.add_typer(files, name="files", rich_help_panel="Fine-tuning")
