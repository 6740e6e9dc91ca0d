"""`loramill doctor`: check this machine."""

from __future__ import annotations

import typer

from loramill.cli.arguments import JsonFlag
from loramill.cli.format import make_console, print_json, print_line, print_table, styled_status


def doctor(json: JsonFlag = False) -> None:
    """Check the installation, kernels, accelerator and settings, and suggest fixes.

    Exits with 1 if a problem makes loramill unusable.
    """
    from loramill.local.doctor import examine
    from loramill.local.findings import Status
    from loramill.local.packages import collapse_packages

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
