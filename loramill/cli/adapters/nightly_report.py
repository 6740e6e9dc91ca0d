"""`loramill nightly report`: the report of a run as a page or as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loramill.cli.adapters.nightly import NO_RUN
from loramill.cli.arguments import JsonFlag
from loramill.cli.format import print_json, print_line, print_message
from loramill.cli.nightly_registry import open_registry
from loramill.errors import NotFound


def report(
    run_id: Annotated[
        str | None,
        typer.Argument(
            metavar="RUN", help="ID of the run. Default: the last one that had work to do.", show_default=False
        ),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Where to write the page. Default: a folder of the run in `home`.",
            show_default=False,
        ),
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Write the report of a nightly run as an HTML page, or print it as JSON.

    The page needs no network. With --json it is written only if --html names a file.
    """
    from loramill.pipelines.nightly.report.publish import build_report, report_page, write_page
    from loramill.registry.nightly import get_run, last_run

    settings, registry = open_registry()
    with registry.reading() as session:
        nightly_run = get_run(session, run_id) if run_id else last_run(session)
    if nightly_run is None:
        raise NotFound(NO_RUN)
    found = build_report(registry, settings, nightly_run)
    if html is not None or not json:
        page = write_page(found, html or report_page(settings, nightly_run.id))
        if not json:
            print_line(str(page))
            print_message(found.summary)
    if json:
        print_json(found)
