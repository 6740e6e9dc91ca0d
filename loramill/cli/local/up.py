"""`loramill up`, `down` and `join`: run loramill on this machine."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console

from loramill.cli.format import print_message


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
