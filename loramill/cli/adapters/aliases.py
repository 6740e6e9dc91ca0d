"""`loramill promote`, `rollback`, `adapters pin`, `unpin` and `warm`: the version that answers requests."""

from __future__ import annotations

import typer

from loramill.cli.arguments import AdapterArgument, AdapterVersionArgument, JsonFlag, VersionArgument
from loramill.cli.format import print_json, print_message, short_version
from loramill.client import Client
from loramill.types import Alias


def promote(name: AdapterVersionArgument, version: VersionArgument = None, json: JsonFlag = False) -> None:
    """Make a version the champion, which answers requests."""
    name, version = _split_version(name, version)
    if version is None:
        raise typer.BadParameter(
            f"give a version: an alias, such as {name}@challenger, or a version that `adapters show {name}` lists."
        )
    with Client() as client:
        adapter = client.adapters.promote(name, version)
    if json:
        print_json(adapter)
    else:
        print_message(
            f"{name} now answers with {short_version(adapter.champion)} (before: {short_version(adapter.previous)})."
        )


def rollback(name: AdapterArgument, json: JsonFlag = False) -> None:
    """Make the previous champion the champion again."""
    with Client() as client:
        adapter = client.adapters.rollback(name)
    if json:
        print_json(adapter)
    else:
        print_message(f"{name} answers with {short_version(adapter.champion)} again.")


def _split_version(name: str, version: str | None) -> tuple[str, str | None]:
    """The adapter's name and the version, which may be part of the name (NAME@VERSION)."""
    name, at, within = name.partition("@")
    if at and version is not None:
        raise typer.BadParameter(f"{within} and {version} are two versions; give one.")
    if at and not within:
        raise typer.BadParameter("give a version or an alias after the '@', such as @previous.")
    return name, within or version


def pin(name: AdapterVersionArgument, version: VersionArgument = None, json: JsonFlag = False) -> None:
    """Make a version (default: the current champion) the champion until it is unpinned.

    No nightly run, promotion or rollback replaces a pinned champion.
    """
    name, version = _split_version(name, version)
    with Client() as client:
        adapter = client.adapters.pin(name, version or Alias.CHAMPION.value)
    if json:
        print_json(adapter)
    else:
        print_message(f"{name} answers with {short_version(adapter.champion)} until `loramill adapters unpin {name}`.")


def unpin(name: AdapterArgument, json: JsonFlag = False) -> None:
    """Allow the champion to change again."""
    with Client() as client:
        adapter = client.adapters.unpin(name)
    if json:
        print_json(adapter)
    else:
        print_message(f"{name} answers with {short_version(adapter.champion)}; promotions are allowed again.")


def warm(name: AdapterVersionArgument, version: VersionArgument = None) -> None:
    """Load a version (default: the champion) before its first request."""
    name, version = _split_version(name, version)
    version = version or Alias.CHAMPION.value
    with Client() as client:
        seconds = client.adapters.warm(name, version)
    print_message(f"{name}@{version} is loaded; its first token took {seconds:.2f} s.")
