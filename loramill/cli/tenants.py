"""`loramill tenant`: tenants, their shares and limits. Needs an admin's key."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from loramill.cli.deleting import delete_tenants
from loramill.cli.format import (
    Cell,
    JsonFlag,
    exact_size,
    print_fields,
    print_json,
    print_message,
    print_table,
    time_ago,
)
from loramill.client import Client
from loramill.client.models import CreatedTenant
from loramill.client.tenant_list import NewTenant, read_tenants
from loramill.client.tenants import Quota
from loramill.errors import InvalidRequest
from loramill.names import check_name
from loramill.submission.options import drop_none
from loramill.types import TenantRecord

tenant = typer.Typer(help="Create, list, limit and delete tenants (needs an admin's key).", no_args_is_help=True)

Tenant = Annotated[str, typer.Argument(help="Name of the tenant.", show_default=False)]


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    tenant.command("delete")(delete_tenants)
    app.add_typer(tenant, name="tenant", rich_help_panel="Tenants")


@tenant.command("create")
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


@tenant.command("list")
def list_tenants(json: JsonFlag = False) -> None:
    """List tenants with their shares and quotas."""
    with Client() as client:
        found = client.tenants.list()
    if json:
        return print_json(found)
    return print_table(
        ("TENANT", "CREATED", "WEIGHT", "RUNNING", "MAX RUNNING", "WAITING", "MAX WAITING"),
        (
            (
                each.name,
                time_ago(each.created_at),
                f"{each.weight:g}",
                str(each.running),
                _format_quota(each.max_running),
                str(each.waiting),
                _format_quota(each.max_queued),
            )
            for each in found
        ),
        empty="No tenants yet: `loramill tenant create NAME` creates one.",
    )


@tenant.command("share")
def set_share(
    name: Tenant,
    weight: Annotated[
        float | None, typer.Option(help="Weight in the fair share of training tokens, relative to other tenants.")
    ] = None,
    max_running: Annotated[
        str | None, typer.Option(metavar="JOBS", help="Maximum number of jobs that run at once, or unlimited.")
    ] = None,
    max_queued: Annotated[
        str | None, typer.Option(metavar="JOBS", help="Maximum number of jobs that wait, or unlimited.")
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Set a tenant's share of the training pool. Omitted options keep their values."""
    running, queued = _parse_quota(max_running, "--max-running"), _parse_quota(max_queued, "--max-queued")
    with Client() as client:
        set_to = client.tenants.set_share(name, weight=weight, max_running=running, max_queued=queued)
    if json:
        print_json(set_to)
    else:
        print_message(
            f"{set_to.name}: weight {set_to.weight:g}; max running: {_format_quota(set_to.max_running)}, "
            f"max waiting: {_format_quota(set_to.max_queued)}."
        )


@tenant.command("limits")
def set_limits(
    name: Tenant,
    requests: Annotated[
        str | None, typer.Option(metavar="N", help="Maximum requests per minute, or unlimited.")
    ] = None,
    tokens: Annotated[
        str | None, typer.Option(metavar="N", help="Maximum prompt and completion tokens per minute, or unlimited.")
    ] = None,
    concurrent: Annotated[
        str | None, typer.Option(metavar="N", help="Maximum number of requests that run at once, or unlimited.")
    ] = None,
    stored: Annotated[
        str | None,
        typer.Option(
            metavar="BYTES", help="Maximum size of uploaded files and imported adapters, such as 10GB, or unlimited."
        ),
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Set a tenant's limits at the gateways, or show them if no option is given. Omitted options keep their values."""
    limits = {
        "requests_per_minute": _parse_quota(requests, "--requests"),
        "tokens_per_minute": _parse_quota(tokens, "--tokens"),
        "concurrent_requests": _parse_quota(concurrent, "--concurrent"),
        "stored_bytes": _parse_bytes(stored, "--stored"),
    }
    with Client() as client:
        set_to = client.tenants.set_limits(name, **limits) if drop_none(limits) else client.tenants.get(name)
    if json:
        print_json(set_to)
    else:
        print_fields(_limit_fields(set_to))


def _limit_fields(tenant: TenantRecord) -> list[tuple[str, Cell]]:
    return [
        ("requests", _format_quota(tenant.requests_per_minute, "{:,} requests/min")),
        ("tokens", _format_quota(tenant.tokens_per_minute, "{:,} tokens/min")),
        ("at once", _format_quota(tenant.concurrent_requests, "{:,} requests")),
        ("files", "unlimited" if tenant.stored_bytes is None else exact_size(tenant.stored_bytes)),
    ]


def _parse_quota(text: str | None, option: str, hint: str = "give a number, or unlimited.") -> Quota:
    if text is None:
        return None
    if text == "unlimited":
        return "unlimited"
    if not text.isdecimal():
        raise typer.BadParameter(hint, param_hint=option)
    return int(text)


def _parse_bytes(text: str | None, option: str) -> Quota:
    found = re.fullmatch(r"(\d{1,12})\s*([kMGT])B", text or "")
    if found is None:
        return _parse_quota(text, option, "give a number of bytes, such as 500MB or 10GB, or unlimited.")
    return int(found[1]) * {"k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}[found[2]]


def _format_quota(limit: int | None, written: str = "{}") -> str:
    return "unlimited" if limit is None else written.format(limit)
