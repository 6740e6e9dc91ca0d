"""`loramill submit --dry-run`: the examples as the base's chat template renders them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.text import Text

from loramill.cli.format import escape_control_characters, print_fields, print_json, print_line, print_message
from loramill.client import Client
from loramill.client.models import FileCheck
from loramill.client.uploads import read_valid
from loramill.names import AdapterName
from loramill.submission.objectives import check_kind
from loramill.submission.options import read_options
from loramill.submission.sweep import check_validation_file


def dry_run(adapter: str, train: str, valid: str | None, job_options: Mapping[str, Any], *, json: bool) -> None:
    """Checks data and options as `submit` would, and prints the result. Nothing is stored."""
    tenant = AdapterName.parse(adapter).tenant
    columns, valid_columns = job_options.get("columns"), job_options.get("valid_columns")
    options = read_options(
        {name: value for name, value in job_options.items() if name not in ("columns", "valid_columns")}
    )
    if options.sweep is not None:
        check_validation_file(valid)
    length, train_on = options.max_length, options.train_on
    with Client() as client:
        found = [client.files.check(train, tenant=tenant, columns=columns, max_length=length, train_on=train_on)]
        if valid is not None:
            source = read_valid(valid, columns, valid_columns)
            found.append(client.files.check(source, tenant=tenant, valid=True, max_length=length, train_on=train_on))
    for each in found:
        check_kind(options.objective or "sft", each.kind, each.filename)
    if json:
        return print_json(found)
    for each in found:
        _print_check(each)
    print_line(_mark_supervised(found[0]))
    return print_message("Nothing was stored or submitted. The loss is computed on the text between ⟦ and ⟧.")


def _print_check(found: FileCheck) -> None:
    tokens = found.tokens
    print_fields(
        [
            (found.filename, Text(found.format)),
            ("examples", str(found.examples)),
            ("tokens", f"{tokens.min} to {tokens.max}, median {tokens.median}, {tokens.total} in all"),
            ("supervised", f"{found.supervised_tokens} tokens"),
        ]
    )
    for warning in found.warnings:
        print_message(f"Warning: {warning}", style="yellow")


def _mark_supervised(found: FileCheck) -> str:
    parts = ((escape_control_characters(part.text), part.supervised) for part in found.preview)
    end = "\n" if found.kind == "preference" else ""  # after each answer
    return "".join(f"⟦{text}⟧{end}" if supervised else text for text, supervised in parts)
