"""`loramill data`: examples for nightly runs."""

from __future__ import annotations

from rich.text import Text

from loramill.cli.arguments import (
    AdapterArgument,
    ColumnsOption,
    JsonFlag,
    TrainOption,
    ValidColumnsOption,
    ValidOption,
)
from loramill.cli.fine_tuning.uploads import report_upload
from loramill.cli.format import print_json, print_message, print_table, styled_status, time_ago
from loramill.client import Client
from loramill.errors import first_lines
from loramill.submission.options import columns_of
from loramill.types import AdapterData


def add_data(
    name: AdapterArgument,
    train: TrainOption,
    valid: ValidOption = None,
    columns: ColumnsOption = None,
    valid_columns: ValidColumnsOption = None,
) -> None:
    """Upload new examples or preference pairs, in any format of `loramill submit`, for the next nightly run."""
    with Client() as client:
        waiting = client.adapters.add_data(
            name,
            train,
            valid=valid,
            columns=columns_of("columns", columns),
            valid_columns=columns_of("valid_columns", valid_columns),
            on_upload=report_upload,
        )
    print_message(f"{name}: {waiting.outlook}", style=None if waiting.enough else "yellow")
    if waiting.enough:
        print_message("`loramill nightly run` starts a nightly run now.")


def list_data(name: AdapterArgument, json: JsonFlag = False) -> None:
    """List an adapter's data for nightly runs: waiting, used, or failed."""
    with Client() as client:
        found = client.adapters.list_data(name)
    if json:
        return print_json(found)
    return print_table(
        ("FILE", "NAME", "EXAMPLES", "VALIDATION", "ADDED", "STATE"),
        (
            (
                each.train,
                each.train_filename,
                str(each.train_examples),
                each.valid_filename or "-",
                time_ago(each.created_at),
                _format_state(each),
            )
            for each in found
        ),
        empty=f"{name} has no data for nightly runs: `loramill data add {name} --train FILE` adds some.",
    )


def _format_state(data: AdapterData) -> Text:
    if data.run is None:
        return styled_status("waiting")
    if data.set_aside is not None:
        reason = first_lines(data.set_aside)
        return styled_status(f"failed in {data.run}: {reason} (`loramill nightly retry {data.adapter}`)")
    return Text(f"in {data.run}" if data.used_at is None else f"used {time_ago(data.used_at)}")
