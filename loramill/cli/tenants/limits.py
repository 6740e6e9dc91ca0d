"""`loramill tenant list`, `share` and `limits`: shares of the training pool, and limits at the gateways."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import typer

from loramill.cli.arguments import JsonFlag, TenantArgument
from loramill.cli.format import Cell, exact_size, print_fields, print_json, print_message, print_table, time_ago
from loramill.cli.model_options import option_help
from loramill.client import Client
from loramill.client.tenants import Quota
from loramill.submission.options import drop_none
from loramill.types import TenantRecord


def _limit(name: str, metavar: str = "N", example: str = "") -> Any:
    """Returns an option that changes a limit, with the description of the tenant's field."""
    text = option_help(TenantRecord, name).removesuffix(".")
    return typer.Option(metavar=metavar, help=f"{text}{example}, or unlimited.")


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


def set_share(
    name: TenantArgument,
    weight: Annotated[float | None, typer.Option(help=option_help(TenantRecord, "weight"))] = None,
    max_running: Annotated[str | None, _limit("max_running", "JOBS")] = None,
    max_queued: Annotated[str | None, _limit("max_queued", "JOBS")] = None,
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


def set_limits(
    name: TenantArgument,
    requests: Annotated[str | None, _limit("requests_per_minute")] = None,
    tokens: Annotated[str | None, _limit("tokens_per_minute")] = None,
    concurrent: Annotated[str | None, _limit("concurrent_requests")] = None,
    stored: Annotated[str | None, _limit("stored_bytes", "BYTES", ", such as 10GB")] = None,
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


def set_storage(
    name: TenantArgument,
    store: Annotated[
        bool | None,
        typer.Option("--store/--no-store", help="Whether completions of requests with `store: true` are stored."),
    ] = None,
    days: Annotated[
        str | None, typer.Option(metavar="DAYS", help="Number of days that they are kept, or default.")
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Record whether a tenant consents to storing completions, or show it if no option is given.

    Omitted options keep their values. Without consent, requests with `store: true` are refused.
    """
    kept_days = _parse_days(days)
    with Client() as client:
        if store is None and kept_days is None:
            set_to = client.tenants.get(name)
        else:
            set_to = client.tenants.set_storage(name, store_completions=store, completion_days=kept_days)
    if json:
        print_json(set_to)
    else:
        days_text = "as in the settings" if set_to.completion_days is None else f"{set_to.completion_days:g}"
        print_fields([("store", "yes" if set_to.store_completions else "no"), ("days", days_text)])


def _parse_days(text: str | None) -> float | Literal["default"] | None:
    if text is None:
        return None
    if text == "default":
        return "default"
    try:
        return float(text)
    except ValueError as error:
        raise typer.BadParameter("give a number of days, or default.", param_hint="--days") from error


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
