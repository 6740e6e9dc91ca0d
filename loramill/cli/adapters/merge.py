"""`loramill adapters merge`: merge an adapter into this machine's base."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from loramill.cli.arguments import FolderOption, JsonFlag
from loramill.cli.format import make_console, print_fields, print_json, print_message

if TYPE_CHECKING:
    from loramill.data.encoding import EncodedExample
    from loramill.models.catalog import Base
    from loramill.settings import Settings

MergeReport = Any  # loramill.jobs.train.export.merge's; the CLI imports higher layers only inside functions


def merge(
    name: Annotated[
        str,
        typer.Argument(
            metavar="TENANT/ADAPTER[@VERSION]",
            help="Adapter, optionally with an alias or version, or a PEFT folder.",
            show_default=False,
        ),
    ],
    to: FolderOption,
    dtype: Annotated[Literal["bf16", "fp32"], typer.Option(help="Data type of the merged weights.")] = "bf16",
    into: Annotated[
        Literal["original", "dequantized"] | None,
        typer.Option(
            help="Weights of a quantized base to merge into. Default: the weights that the adapter was trained on."
        ),
    ] = None,
    valid: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            exists=True,
            dir_okay=False,
            help="JSONL of examples to compare on. Default: the validation or training file of the adapter's job.",
        ),
    ] = None,
    max_kl: Annotated[
        float | None,
        typer.Option(min=0, help="Refuse if the KL divergence exceeds this (nats per token).", show_default="0.02"),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write the merged model even if it exceeds --max-kl.")] = False,
    json: JsonFlag = False,
) -> None:
    """Merge an adapter into the configured base, and write a Hugging Face folder.

    The merged model is compared with the unmerged adapter as it is served. The mean KL divergence in nats per token is
    printed and stored in the folder; if it exceeds --max-kl, nothing is written.
    """
    from loramill.errors import InvalidRequest
    from loramill.jobs.train.export.merge import MAX_KL, MergeOptions
    from loramill.jobs.train.export.merge import merge as merge_adapter
    from loramill.local.model import find_model
    from loramill.settings import Settings

    settings = Settings.load()
    base, version, source = find_model(name, settings)
    if version is None:
        raise InvalidRequest(f"'{name}' is the base itself: name an adapter to merge into it.")
    with make_console(stderr=True).status("Merging…") as status:
        report = merge_adapter(
            base,
            source(version),
            _comparison_examples(base, name, valid, settings),
            to,
            name=name if Path(version).is_dir() else f"{name.partition('@')[0]}@{version}",
            options=MergeOptions(into=into, dtype=dtype, max_kl=MAX_KL if max_kl is None else max_kl, force=force),
            on_stage=lambda stage: status.update(f"Merging: {stage}…"),
        )
    if json:
        return print_json(report)
    _print_report(report, to)
    return None


def _comparison_examples(base: Base, name: str, file: Path | None, settings: Settings) -> list[EncodedExample]:
    """Reads the examples of the file, or those that the version's job was validated or trained on.

    Raises:
        InvalidRequest: There is no file, and the version's job is unknown.
        DatasetInvalid: The file is invalid.
    """
    from loramill.data.encoding import encode_example
    from loramill.data.examples import read_examples
    from loramill.data.tokenizer import ChatTokenizer

    raw, filename = (file.read_bytes(), file.name) if file is not None else _job_dataset(name, settings)
    tokenizer = ChatTokenizer.load(base.folder).at_time(datetime.now(UTC))
    found = read_examples(raw, filename).examples
    return [sequence for example in found for sequence in encode_example(tokenizer, example).sequences]


def _job_dataset(name: str, settings: Settings) -> tuple[bytes, str]:
    from loramill.errors import InvalidRequest
    from loramill.names import ModelName
    from loramill.registry import Registry, adapters, datasets, jobs

    missing = InvalidRequest(f"The job that created {name} is unknown: give examples to compare on with --valid FILE.")
    if Path(name).expanduser().is_dir():
        raise missing
    model = ModelName.parse(name)
    assert model.adapter is not None  # `find_model` found it
    registry = Registry.open(settings.database, settings.artifacts)
    with registry.reading() as session:
        made_by = adapters.resolve(session, model.adapter, model.selector).job
        if made_by is None:
            raise missing
        spec = jobs.get(session, made_by).spec
        dataset = datasets.get(session, spec.valid or spec.train, tenant=model.adapter.tenant)
    return registry.artifacts.read(dataset.artifact, "data.jsonl"), dataset.filename


def _print_report(report: MergeReport, to: Path) -> None:
    found = report.divergence
    print_fields(
        [
            ("folder", str(to)),
            ("adapter", report.adapter),
            ("base", f"{report.base}, {report.into} values ({report.quantization})"),
            ("weights", report.dtype),
            (
                "divergence",
                f"{found.kl:.2e} nats per token, at most {found.max_token_kl:.2e}; bound {report.max_kl:g}",
            ),
            ("same token", f"{found.agreement:.2%} of {found.tokens} tokens of {found.examples} examples"),
        ]
    )
    if found.kl > report.max_kl:
        print_message("The divergence exceeds the bound; the model was written because of --force.", "yellow")
