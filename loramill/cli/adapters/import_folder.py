"""`loramill adapters import`: upload an adapter that was trained elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loramill.cli.arguments import JsonFlag
from loramill.cli.format import print_json, print_message, short_version
from loramill.client import Client
from loramill.names import AdapterName


def import_adapter(
    name: Annotated[
        str,
        typer.Argument(
            metavar="TENANT/ADAPTER",
            help="Name of the adapter; it is created if it does not exist.",
            show_default=False,
        ),
    ],
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER", help="Folder saved by PEFT, Unsloth or Axolotl.", exists=True, file_okay=False
        ),
    ],
    promote: Annotated[
        bool, typer.Option("--promote", help="Make the version the champion, which answers requests.")
    ] = False,
    json: JsonFlag = False,
) -> None:
    """Upload a LoRA that was trained elsewhere on the same base, as a version of an adapter.

    FOLDER contains adapter_config.json and adapter_model.safetensors. The first version of an adapter becomes its
    champion, a later one its challenger unless --promote is given.
    """
    with Client() as client:
        version, adapter = client.adapters.import_folder(name, folder, promote=promote)
    if json:
        return print_json(adapter)
    at = AdapterName.parse(name).at(version)
    if adapter.champion == version:
        return print_message(f"{at} is imported, and {name} answers with it: `loramill chat {name}`.")
    return print_message(
        f"{at} is imported; {name} still answers with {short_version(adapter.champion)}. "
        f"`loramill promote {at}` makes the imported version answer."
    )
