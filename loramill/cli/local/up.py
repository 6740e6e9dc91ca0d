"""`loramill up`, `down` and `join`: run loramill on this machine."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from loramill.cli.format import print_message
from loramill.cli.model_options import option_help
from loramill.settings import JobSettings, ServeSettings, Settings
from loramill.submission.options import drop_none


def up(
    port: Annotated[int | None, typer.Option(min=1, max=65535, help=option_help(ServeSettings, "port"))] = None,
    host: Annotated[str | None, typer.Option(help=option_help(ServeSettings, "host"))] = None,
    base: Annotated[str | None, typer.Option(help=option_help(Settings, "base"))] = None,
    sessions: Annotated[int | None, typer.Option(min=1, help=option_help(JobSettings, "sessions"))] = None,
    detach: Annotated[
        bool, typer.Option("--detach", "-d", help="Run in the background; return when the gateway is ready.")
    ] = False,
) -> None:
    """Run the registry, gateway, engine and training on this machine until Ctrl-C.

    State of earlier runs is kept. Options override loramill.toml and LORAMILL_* variables.
    """
    from loramill.local.up import up as run
    from loramill.local.up import up_in_background

    settings = Settings.load(
        **drop_none({"base": base}),
        serve=drop_none({"host": host, "port": port}),
        jobs=drop_none({"sessions": sessions}),
    )
    start = up_in_background if detach else run
    start(settings, console=Console(highlight=False))


def down() -> None:
    """Stop `loramill up` on this machine. Its data is kept."""
    from loramill.local.up import down as stop

    print_message("Stopped." if stop(Settings.load()) else "Nothing was running.")


def join() -> None:
    """Deploy to the Ray cluster whose head is this machine, and wait. Ctrl-C leaves the deployment running.

    See cluster.yaml. A second run replaces the deployment.
    """
    import signal

    from loramill.pipelines.cluster.join import join as deploy

    settings = Settings.load()
    deploy(settings)
    print_message(f"loramill is up at {settings.address}/v1; the admin key is in {settings.admin_key_file}.")
    signal.sigwait({signal.SIGINT, signal.SIGTERM})
