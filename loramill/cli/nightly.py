"""`loramill nightly`: retrain whoever has new data, and promote what is measurably better."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import typer

from loramill.cli import show

nightly = typer.Typer(help="Nightly retraining, on the machine that holds the record.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    app.add_typer(nightly, name="nightly", rich_help_panel="Adapters")


@nightly.command()
def run(json: show.AsJson = False) -> None:
    """Run a night now, or go on with one that was interrupted."""
    from loramill.pipelines.nightly import run_night
    from loramill.registry import Registry
    from loramill.settings import Settings
    from loramill.wire import openai_errors

    settings = Settings.load()
    registry = Registry.open(settings.database, settings.artifacts)
    with openai_errors(settings.gateway):
        night = run_night(
            registry, settings, report=lambda step: show.say(f"{step.adapter}: {step.step} {step.status}")
        )
    _print(registry, night.id, json)


@nightly.command("show")
def show_night(json: show.AsJson = False) -> None:
    """Show the last night: scores, decisions and reasons."""
    from loramill.registry import Registry
    from loramill.registry.nightly import runs
    from loramill.settings import Settings

    settings = Settings.load()
    registry = Registry.open(settings.database, settings.artifacts)
    with registry.reading() as session:
        nights = runs(session, limit=1)
    if not nights and json:
        show.as_json([])
    elif not nights:
        show.say("No night has run yet: `loramill nightly run` runs one.")
    else:
        _print(registry, nights[0].id, json)


def _print(registry: Any, night: str, json: bool) -> None:
    from loramill.pipelines.nightly import by_adapter
    from loramill.registry.nightly import steps

    with registry.reading() as session:
        done = steps(session, night)
    if json:
        return show.as_json(done)
    return show.table(
        ("ADAPTER", "BASE", "CHAMPION", "CHALLENGER", "DECISION", "REASON"),
        (row(adapter, results) for adapter, results in by_adapter(done).items()),
        empty="No adapter had new data.",
    )


def row(adapter: str, results: Mapping[str, Mapping[str, Any]]) -> tuple[show.Cell, ...]:
    """One adapter's night; scores are token F1 over all its slices."""
    slices = results.get("evaluate", {}).values()
    scores = [
        _overall([roles[role] for roles in slices if role in roles]) for role in ("base", "champion", "challenger")
    ]
    gate = results.get("gate", {})
    if gate:
        decision, reason = show.status("promoted" if gate["promote"] else "held"), str(gate["reason"])
    else:
        failed = results.get("train", {}).get("error")
        decision, reason = show.status("failed" if failed else "running"), str(failed or "")
    return (adapter, *scores, decision, reason)


def _overall(parts: list[Mapping[str, Any]]) -> str:
    total = sum(part["examples"] for part in parts)
    return f"{sum(part['token_f1'] * part['examples'] for part in parts) / total:.3f}" if total else "-"
