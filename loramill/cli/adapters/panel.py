"""Adds the commands of the panel "Adapters"."""

from __future__ import annotations

import typer

from loramill.cli.adapters.aliases import pin, promote, rollback, unpin, warm
from loramill.cli.adapters.canary import canary
from loramill.cli.adapters.chat import chat
from loramill.cli.adapters.data import add_data, list_data
from loramill.cli.adapters.delete import delete_adapters
from loramill.cli.adapters.export import export
from loramill.cli.adapters.feedback import delete_feedback, export_feedback, list_feedback
from loramill.cli.adapters.generate import generate
from loramill.cli.adapters.import_folder import import_adapter
from loramill.cli.adapters.merge import merge
from loramill.cli.adapters.nightly import backfill, drop, retry, run, show_data, show_run
from loramill.cli.adapters.nightly_approve import approve
from loramill.cli.adapters.nightly_report import report
from loramill.cli.adapters.nightly_schedule import history, plan, status, validate
from loramill.cli.adapters.retention import prune_adapters, set_retention
from loramill.cli.adapters.show import list_adapters, rename_adapter, show_adapter
from loramill.cli.groups import ListByDefault

adapters = typer.Typer(cls=ListByDefault, help="List and change adapters and their versions. Default: list.")
data = typer.Typer(help="Add and list the examples that nightly runs train an adapter on.", no_args_is_help=True)
feedback = typer.Typer(cls=ListByDefault, help="List, export and delete ratings and corrections. Default: list.")
nightly = typer.Typer(
    help="Retrain adapters with new data; runs on the machine with the registry.", no_args_is_help=True
)


def add_adapter_commands(app: typer.Typer) -> None:
    """Adds the commands to the root."""
    adapters.command("list")(list_adapters)
    adapters.command("show")(show_adapter)
    adapters.command("delete")(delete_adapters)
    adapters.command("rename")(rename_adapter)
    adapters.command("export")(export)
    adapters.command("import")(import_adapter)
    adapters.command("merge")(merge)
    adapters.command("canary")(canary)
    adapters.command("pin")(pin)
    adapters.command("unpin")(unpin)
    adapters.command("warm")(warm)
    adapters.command("retention")(set_retention)
    adapters.command("prune")(prune_adapters)
    data.command("add")(add_data)
    data.command("list")(list_data)
    feedback.command("list")(list_feedback)
    feedback.command("export")(export_feedback)
    feedback.command("delete")(delete_feedback)
    nightly.command("run")(run)
    nightly.command("show")(show_run)
    nightly.command("report")(report)
    nightly.command("validate")(validate)
    nightly.command("plan")(plan)
    nightly.command("status")(status)
    nightly.command("history")(history)
    nightly.command("data")(show_data)
    nightly.command("approve")(approve)
    nightly.command("retry")(retry)
    nightly.command("drop")(drop)
    nightly.command("backfill")(backfill)
    for command in (promote, rollback, chat, generate):
        app.command(rich_help_panel="Adapters")(command)
    app.add_typer(adapters, name="adapters", rich_help_panel="Adapters")
    app.add_typer(data, name="data", rich_help_panel="Adapters")
    app.add_typer(feedback, name="feedback", rich_help_panel="Adapters")
    app.add_typer(nightly, name="nightly", rich_help_panel="Adapters")
