"""`loramill up`, `down`, `join`, `doctor` and `settings`: loramill on this machine."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console

from loramill.cli.format import (
    JsonFlag,
    make_console,
    print_json,
    print_line,
    print_message,
    print_table,
    styled_status,
)


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    for command in (up, down, join, doctor, settings):
        app.command(rich_help_panel="This machine")(command)


def up(
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Port that the gateway listens on.")] = None,
    host: Annotated[
        str | None,
        typer.Option(help="Address that the gateway listens on; 0.0.0.0 means all addresses of this machine."),
    ] = None,
    base: Annotated[str | None, typer.Option(help="Base model: built-in name, local folder or hub id.")] = None,
    sessions: Annotated[int | None, typer.Option(min=1, help="Maximum number of jobs that train at once.")] = None,
    detach: Annotated[
        bool, typer.Option("--detach", "-d", help="Run in the background; return when the gateway is ready.")
    ] = False,
) -> None:
    """Run the registry, gateway, engine and training on this machine until Ctrl-C.

    State of earlier runs is kept. Options override loramill.toml and LORAMILL_* variables.
    """
    from loramill.local.processes import up as run
    from loramill.local.processes import up_in_background
    from loramill.settings import Settings

    overrides: dict[str, Any] = {}
    if port is not None or host is not None:
        overrides["serve"] = {name: value for name, value in (("host", host), ("port", port)) if value is not None}
    if sessions is not None:
        overrides["jobs"] = {"sessions": sessions}
    if base is not None:
        overrides["base"] = base
    start = up_in_background if detach else run
    start(Settings.load(**overrides), console=Console(highlight=False))


def down() -> None:
    """Stop `loramill up` on this machine. Its data is kept."""
    from loramill.local.processes import down as stop
    from loramill.settings import Settings

    print_message("Stopped." if stop(Settings.load()) else "Nothing was running.")


def join() -> None:
    """Deploy to the Ray cluster whose head is this machine, and wait. Ctrl-C leaves the deployment running.

    See cluster.yaml. A second run replaces the deployment.
    """
    import signal

    from loramill.pipelines.cluster.join import join as deploy
    from loramill.settings import Settings

    settings = Settings.load()
    deploy(settings)
    print_message(f"loramill is up at {settings.address}/v1; the admin key is in {settings.admin_key_file}.")
    signal.sigwait({signal.SIGINT, signal.SIGTERM})


def doctor(json: JsonFlag = False) -> None:
    """Check the installation, kernels, accelerator and settings, and suggest fixes.

    Exits with 1 if a problem makes loramill unusable.
    """
    from loramill.local.doctor import Status, collapse_packages, examine

    with make_console(stderr=True).status("Examining this machine…"):
        findings = examine()
    if json:
        print_json(findings)
    else:
        grid = [(styled_status(each.status), each.what, each.found) for each in collapse_packages(findings)]
        print_table(("", "CHECK", "FOUND"), grid, empty="Nothing to examine.")
        fixes = [(styled_status(each.status), each.what, each.fix) for each in findings if each.fix]
        if fixes:
            print_line("")
            print_table(("", "CHECK", "FIX"), fixes, empty="")
    if any(each.status is Status.ERROR for each in findings):
        raise typer.Exit(1)


def settings(json: JsonFlag = False) -> None:
    """Print all settings with their values and sources. Secrets are masked."""
    from loramill.settings_origin import effective_settings

    found = effective_settings()
    if json:
        print_json(found)
        return
    rows = [(each.name, _format_value(each.value), each.origin) for each in found]
    print_table(("SETTING", "VALUE", "SOURCE"), rows, empty="")


def _format_value(value: Any) -> str:
    """Formats the value of a setting."""
    if value is None:
        return "-"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return str(value).lower() if isinstance(value, bool) else str(value)
