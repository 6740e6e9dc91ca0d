"""Messages about uploaded files."""

from __future__ import annotations

from loramill.cli.format import print_message
from loramill.client.models import File
from loramill.plural import counted


def report_upload(file: File) -> None:
    """Reports the detected format of an uploaded file, and its warnings."""
    count = "" if file.examples is None else f": {counted(file.examples, 'example')}"
    print_message(f"{file.filename}{count}; {file.format}.")
    report_warnings(file)


def report_warnings(file: File) -> None:
    """Reports the warnings about an uploaded file."""
    for warning in file.warnings:
        print_message(f"Warning: {warning}", style="yellow")
