"""`loramill tenant create`: create tenants, with API keys if wanted."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from loramill.cli.arguments import JsonFlag
from loramill.cli.format import print_json, print_message, print_table
from loramill.client import Client
from loramill.client.models import CreatedTenant
from loramill.client.tenant_list import MAX_TENANTS_PER_REQUEST, NewTenant, read_tenants
from loramill.errors import InvalidRequest
from loramill.names import check_name


def create_tenants(
    names: Annotated[list[str] | None, typer.Argument(metavar="[TENANT…]", help="Names of the new tenants.")] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="File of tenants: one name per line, or CSV, TSV or JSONL with name, weight and limits.",
        ),
    ] = None,
    with_keys: Annotated[
        bool,
        typer.Option("--with-keys", help="Create and print an API key for each new tenant. It can't be shown again."),
    ] = False,
    keys_out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Create an API key for each new tenant, and write the keys to a new CSV file."
        ),
    ] = None,
    exist_ok: Annotated[
        bool,
        typer.Option("--exist-ok", help="Accept existing tenants, and update their weights and limits from FILE."),
    ] = False,
    json: JsonFlag = False,
) -> None:
    """Create tenants, all or none."""
    wanted = _requested_tenants(names or [], file)
    with Client() as client, _key_file(keys_out) as write_keys:
        made = client.tenants.create_many(wanted, exist_ok=exist_ok, keys=with_keys or keys_out is not None)
        write_keys(made)
    if json:
        # A single name gives a single object.
        return print_json(made[0] if file is None and len(made) == 1 else made)
    if with_keys:
        print_table(
            ("TENANT", "KEY"),
            ((each.name, each.key or "- (already existed; `loramill key create` creates a key)") for each in made),
            empty="",
        )
    return print_message(_summary(made, keys_out, with_keys=with_keys))


def create_missing_tenants(names: Collection[str]) -> None:
    """Creates the tenants that do not exist, and reports each."""
    with Client() as client:
        ordered = sorted(names)
        for start in range(0, len(ordered), MAX_TENANTS_PER_REQUEST):
            for each in client.tenants.create_many(ordered[start : start + MAX_TENANTS_PER_REQUEST], exist_ok=True):
                if each.new:
                    print_message(f"Tenant {each.name} created.")


def _requested_tenants(names: Sequence[str], file: Path | None) -> list[str | NewTenant]:
    """Returns the tenants to create, each once.

    Raises:
        InvalidRequest: A name or the file is invalid.
    """
    for name in names:
        check_name(name, "tenant")
    listed = read_tenants(file) if file is not None else []
    if not names and not listed:
        raise typer.BadParameter("give names of tenants, or --file FILE.")
    seen = {each.name for each in listed}
    return [*(name for name in dict.fromkeys(names) if name not in seen), *listed]


@contextmanager
def _key_file(path: Path | None) -> Iterator[Callable[[Sequence[CreatedTenant]], None]]:
    """Opens a file for keys, readable only by its owner, before any key is created; deletes it after an error.

    Raises:
        InvalidRequest: The file exists or can't be written.
    """
    if path is None:
        yield lambda made: None
        return
    try:
        file = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8", newline="")
    except FileExistsError as error:
        raise InvalidRequest(f"{path} exists; keys are written only to a new file.") from error
    except OSError as error:
        raise InvalidRequest(f"{path} can't be written: {error.strerror}.") from error

    def write(made: Sequence[CreatedTenant]) -> None:
        rows = csv.writer(file)
        try:
            rows.writerow(("tenant", "key_id", "key"))
            rows.writerows((each.name, each.key_id, each.key) for each in made if each.key)
            file.flush()
        except OSError as error:
            raise InvalidRequest(
                f"The tenants were created, but {path} can't be written ({error.strerror}): create new keys with "
                "`loramill key create`."
            ) from error

    try:
        with file:
            yield write
    except BaseException:
        path.unlink()
        raise


def _summary(made: Sequence[CreatedTenant], keys_out: Path | None, *, with_keys: bool) -> str:
    new = [each for each in made if each.new]
    before = f", {len(made) - len(new)} already existed" if len(new) < len(made) else ""
    what = f"Tenant {new[0].name} created" if len(new) == 1 else f"{len(new)} tenants created"
    if keys_out is not None:
        return f"{what}{before}; their keys are in {keys_out}."
    if with_keys:
        return f"{what}{before}. The keys can't be shown again."
    name = new[0].name if len(new) == 1 else "TENANT"
    return f"{what}{before}; `loramill key create {name}` creates a key{'' if len(new) == 1 else ' for one of them'}."
