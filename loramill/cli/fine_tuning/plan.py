"""`loramill plan`: the memory that a job needs, from the base's config.json alone."""

from __future__ import annotations

import json as encoding
import tomllib
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError

from loramill.cli.arguments import JsonFlag
from loramill.cli.fine_tuning.job_options import option_help
from loramill.cli.format import print_line, print_table
from loramill.errors import DoesNotFit, InvalidRequest
from loramill.names import AdapterName
from loramill.settings import Settings
from loramill.submission.options import JobOptions

if TYPE_CHECKING:
    from loramill.sizing import GpuPool, SizingPlan, SizingRequest
    from loramill.types import JobSpec, Quantization

#: What a spec's file may say besides a job's own fields.
_PLAN_FIELDS = ("base", "gpu", "cpu", "per_gpu", "length", "batch_size", "answers")

SpecFile = Annotated[
    Path | None,
    typer.Argument(metavar="[SPEC]", help="TOML or JSON file with the options below and other options of a job."),
]


def plan(
    spec: SpecFile = None,
    *,
    base: Annotated[
        str | None,
        typer.Option(metavar="BASE", help="Base: folder, config.json, hub id, or the size of a Llama such as 65B."),
    ] = None,
    gpu: Annotated[
        str | None, typer.Option(metavar="GPU", help="GPU, by memory or name, such as 24GB or h100.")
    ] = None,
    cpu: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory of a session without a GPU, instead of --gpu.")
    ] = None,
    per_gpu: Annotated[int | None, typer.Option(help="Number of jobs that share the GPU.")] = None,
    method: Annotated[str | None, typer.Option(help=option_help("method"))] = None,
    quantization: Annotated[str | None, typer.Option(help="Quantization of the base: none, int8 or nf4.")] = None,
    rank: Annotated[int | None, typer.Option(help=option_help("rank"))] = None,
    targets: Annotated[str | None, typer.Option(metavar="LIST", help=option_help("targets"))] = None,
    layers: Annotated[str | None, typer.Option(metavar="LIST", help=option_help("layers"))] = None,
    length: Annotated[int | None, typer.Option(help=option_help("max_length"))] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples per optimizer step. Default: 8.")] = None,
    answers: Annotated[float | None, typer.Option(help="Fraction of the tokens with a loss. Default: 1.")] = None,
    micro_tokens: Annotated[int | None, typer.Option(help=option_help("micro_tokens"))] = None,
    gradient_checkpointing: Annotated[
        bool | None,
        typer.Option(help=JobOptions.model_fields["gradient_checkpointing"].description, show_default=False),
    ] = None,
    offload: Annotated[str | None, typer.Option(help=option_help("offload"))] = None,
    json: JsonFlag = False,
) -> None:
    """Show the memory that a job needs and the options that make it fit, from the base's config.json alone.

    Default device: the pool of the settings; if its size is unknown, no options are chosen. Exits with 1 if the job
    does not fit, and shows the nearest jobs that do.
    """
    from loramill.sizing import plan as planned
    from loramill.sizing.planner import plan_as_is

    options = {
        "base": base, "gpu": gpu, "cpu": cpu, "per_gpu": per_gpu, "method": method, "quantization": quantization,
        "rank": rank, "targets": None if targets is None else _split_names(targets), "layers": layers, "length": length,
        "batch_size": batch_size, "answers": answers, "micro_tokens": micro_tokens,
        "gradient_checkpointing": gradient_checkpointing, "offload": offload,
    }  # fmt: skip
    question_fields = _read_spec_file(spec) | {name: value for name, value in options.items() if value is not None}
    question, known = _sizing_request(question_fields)
    try:
        found = planned(question) if known else plan_as_is(question, question.spec)
    except DoesNotFit as error:
        if json:
            print_line(encoding.dumps({"fits": False, "message": error.message, "nearest": error.nearest}, indent=2))
            raise typer.Exit(1) from error
        raise
    if json:
        print_line(encoding.dumps(_as_dict(found, known), indent=2))
    else:
        _print_plan(found, known)


def _sizing_request(options: dict[str, Any]) -> tuple[SizingRequest, bool]:
    """What is to be planned, and whether the device's size is known."""
    from loramill.sizing import ADJUSTABLE, SizingRequest, anatomy, find_config

    settings = Settings.load()
    pool = _gpu_pool(options, settings)
    config = anatomy(find_config(options.get("base", settings.base), settings.cache))
    spec, quantization = _spec(options, config.context, settings)
    question = SizingRequest(
        spec=spec,
        base=config,
        quantization=quantization,
        lengths=(spec.max_length,),
        pool=pool,
        adjustable=frozenset(ADJUSTABLE) - spec.model_fields_set,
        supervised_fraction=float(options.get("answers", 1.0)),
        shared_prefixes=False,
    )
    return question, pool.device_bytes > 0


def _spec(options: dict[str, Any], context: int, settings: Settings) -> tuple[JobSpec, Quantization]:
    from loramill.models.catalog import Base
    from loramill.submission.defaults import BATCH_SIZE, resolve_spec
    from loramill.submission.request import Hyperparameters, JobRequest, LoramillOptions

    own = {name: value for name, value in options.items() if name not in _PLAN_FIELDS}
    if "length" in options:
        own["max_length"] = options["length"]
    quantization = own.pop("quantization", "nf4" if own.get("method") == "qlora" else settings.quantization)
    try:
        # A command line gives numbers as texts.
        request = JobRequest(
            adapter=AdapterName("plan", "plan"),
            train="plan",
            hyperparameters=Hyperparameters.model_validate(
                {"batch_size": options.get("batch_size", BATCH_SIZE)}, strict=False
            ),
            options=LoramillOptions.model_validate({**own, "quantization": quantization}, strict=False),
        )
    except ValidationError as error:
        problem = error.errors()[0]
        field = str(problem["loc"][0])
        raise InvalidRequest(f"'{field}': {problem['msg']}.", param=field) from error
    quantization = request.options.quantization or "none"
    base = Base("plan", Path(), "0" * 64, "plan", context, quantization)
    return resolve_spec(request, base, examples=1000), quantization


def _gpu_pool(options: dict[str, Any], settings: Settings) -> GpuPool:
    """The device that is meant; of 0 bytes if its size isn't known."""
    from loramill.sizing import GpuPool
    from loramill.sizing.devices import gpu_bytes, memory_bytes

    sharers = int(options.get("per_gpu", settings.jobs.per_gpu))
    if "gpu" in options and "cpu" in options:
        raise InvalidRequest("'gpu' and 'cpu' exclude each other; give one.", param="gpu")
    if "gpu" in options:
        return GpuPool("cuda", gpu_bytes(str(options["gpu"])), sharers)
    if "cpu" in options:
        return GpuPool("cpu", memory_bytes(str(options["cpu"])))
    return GpuPool.from_settings(settings.jobs) or GpuPool("cuda" if settings.jobs.use_gpu else "cpu", 0)


def _read_spec_file(file: Path | None) -> dict[str, Any]:
    if file is None:
        return {}
    try:
        text = file.read_text(encoding="utf-8")
        values = encoding.loads(text) if file.suffix == ".json" else tomllib.loads(text)
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"The spec {file} can't be read: {error}. Give TOML, or JSON in a .json file.") from error
    if not isinstance(values, dict):
        raise InvalidRequest(f"The spec {file} holds no table of fields.")
    return values


def _split_names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


def _as_dict(found: SizingPlan, known: bool) -> dict[str, Any]:
    spec = found.spec
    return {
        "fits": True if known else None,
        "bytes": found.memory.bytes,
        "budget": found.pool.budget_bytes if known else None,
        "sharers": found.sharers if known else None,
        "host_bytes": found.memory.host_bytes,
        "items": [asdict(item) for item in found.memory.items],
        "row_tokens": found.row.tokens,
        "passes": found.passes,
        "micro_tokens": spec.micro_tokens,
        "gradient_checkpointing": spec.gradient_checkpointing,
        "offload": spec.offload,
    }


def _print_plan(found: SizingPlan, known: bool) -> None:
    from loramill.sizing import format_bytes

    total = found.memory.bytes
    rows = [
        (item.name, format_bytes(item.bytes), f"{item.bytes / total:.0%}", item.description)
        for item in found.memory.items
    ]
    print_table(("ITEM", "BYTES", "SHARE", ""), [*rows, ("total", format_bytes(total), "100%", "")], empty="")
    if found.memory.host_bytes:
        print_line(f"Additional host memory: {format_bytes(found.memory.host_bytes)}.")
    print_line(found.explanation if known else "Give --gpu or --cpu to see whether the job fits.")
