"""`loramill-bench`: runs the benchmarks on this machine and compares the results with their targets."""

from __future__ import annotations

import json as encoding
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.text import Text

from loramill.cli.format import Cell, print_message, print_table
from loramill.cli.groups import Root
from loramill.logs import quiet_libraries

if TYPE_CHECKING:
    from loramill.models.catalog import Base
    from loramill_bench.results import Result

Only = Annotated[str, typer.Option(metavar="TEXT", help="Run only groups of cases whose name contains TEXT.")]
Json = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", dir_okay=False, help="Also write the results to FILE as JSON.")
]
Check = Annotated[bool, typer.Option("--check", help="Exit with status 1 if a target is missed.")]
Record = Annotated[bool, typer.Option("--record", help="Append the results to this checkout's benchmarks/results.csv.")]
TenantsFolder = Annotated[
    Path,
    typer.Option(
        "--tenants",
        metavar="FOLDER",
        exists=True,
        file_okay=False,
        help="Folder that contains one folder of data per tenant.",
    ),
]

app = typer.Typer(
    cls=Root,
    help="Benchmarks of the kernels, the engine, training, and serving, with targets.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Entry point of the command `loramill-bench`."""
    quiet_libraries()
    app()


@app.command()
def kernels(
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Device to measure.")] = "cpu",
    only: Only = "",
    json: Json = None,
    check: Check = False,
    record: Record = False,
) -> None:
    """Measure the kernels on one thread (about three minutes)."""
    from loramill_bench.kernels import rivals, run

    other_versions = rivals.versions() if device == "cuda" else ()
    _run_benchmark(lambda: run(device, only, _report), json, check, record, device, other_versions=other_versions)


@app.command()
def engine(only: Only = "", json: Json = None, check: Check = False, record: Record = False) -> None:
    """Measure the engine on the built-in base with one thread (about eight minutes).

    It is compared with PEFT, with transformers' continuous batching, and with the limits of memory and arithmetic.
    """
    from loramill_bench.engine import BASELINES, run

    _run_benchmark(lambda: run(_built_in_base(), only, _report), json, check, record, baselines=BASELINES)


@app.command()
def train(only: Only = "", json: Json = None, check: Check = False, record: Record = False) -> None:
    """Measure training and the job queue on the built-in base with one thread per process (about an hour).

    Training speed is compared with PEFT and transformers' Trainer, and estimated memory with that of jobs, alone and in
    one session.
    """
    from loramill_bench.training.run import BASELINES, run

    _run_benchmark(lambda: run(_built_in_base(), only, _report), json, check, record, baselines=BASELINES)


@app.command()
def serve(
    vllm: Annotated[
        Path | None,
        typer.Option(
            metavar="PYTHON",
            exists=True,
            dir_okay=False,
            help="Python interpreter of an environment with vLLM. Without it, vLLM is not measured.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Random seed for adapters and requests.")] = 0,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds per comparison, after one warm-up round.")] = 3,
    only: Only = "",
    json: Json = None,
    check: Check = False,
    record: Record = False,
) -> None:
    """Measure serving over HTTP on the built-in base with all cores (ten minutes; half an hour with vLLM).

    Starts its own `loramill up`. The gateway is compared with vLLM, and with the engine and a replica called directly.
    """
    from loramill_bench.http import run, vllm_version

    other_versions = [] if vllm is None else [vllm_version(vllm)]
    _print_note(f"Comparing with {other_versions[0]}." if other_versions else "vLLM is not measured without --vllm.")
    _run_benchmark(
        lambda: run(_built_in_base(), only, _report, vllm=vllm, seed=seed, rounds=rounds),
        json,
        check,
        record,
        other_versions=other_versions,
    )


@app.command()
def soak(
    minutes: Annotated[float, typer.Option(min=0.01, help="Duration of the run.")] = 30.0,
    seed: Annotated[int, typer.Option(help="Random seed for the requests. Their timing depends on the machine.")] = 0,
    json: Json = None,
) -> None:
    """Serve random requests with cancellations, timeouts and failing adapter loads, and check every answer.

    Exits with status 1 if an answer is lost, late, duplicated or different from the answer to the request alone, if an
    invariant is violated, or if memory grows.
    """
    from loramill_bench.soak.run import soak as run

    _run_benchmark(lambda: run(_built_in_base(), 60 * minutes, _print_note, seed=seed), json, check=True)


@app.command()
def quality(
    tenants: TenantsFolder,
    only: Only = "",
    json: Json = None,
    check: Check = False,
) -> None:
    """Train on real tenants' data with default options, and score answers to test questions (about one hour)."""
    from loramill.settings import Settings
    from loramill_bench.quality.run import run

    _run_benchmark(lambda: run(tenants, Settings.load(), only, _report), json, check)


@app.command()
def sweep(
    tenants: TenantsFolder,
    steps: Annotated[int, typer.Option(min=8, help="Optimizer steps of a whole training.")] = 64,
    only: Only = "",
    json: Json = None,
    check: Check = False,
    record: Record = False,
) -> None:
    """Sweep eight candidates on real tenants' data, and train all of them to the end (about one hour)."""
    from loramill_bench.training.sweep import run

    _run_benchmark(lambda: run(_built_in_base(), tenants, only, _report, steps=steps), json, check, record)


@app.command()
def nightly(
    tenants: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            exists=True,
            file_okay=False,
            help="Folder that contains one folder of data per tenant. Without it, neither forgetting nor poisoned data "
            "is measured.",
        ),
    ] = None,
    tenant: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="Measure forgetting on this tenant; may be repeated. Default: six.", show_default=False
        ),
    ] = None,
    examples: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Training examples per tenant and run in which forgetting is measured. Default: all.",
            show_default=False,
        ),
    ] = None,
    only: Only = "",
    json: Json = None,
    check: Check = False,
    record: Record = False,
) -> None:
    """Measure the nightly run: overhead, evaluation and gate (a quarter of an hour), forgetting, and poisoned data.

    The gate is measured on simulated runs, whose scores are resampled from measured ones. Forgetting takes an hour of
    CPU time per tenant with all of its examples, and the three runs with poisoned data three quarters of an hour.
    """
    from loramill_bench.nightly.forgetting import TENANTS
    from loramill_bench.nightly.run import BASELINES, run

    if tenants is None:
        _print_note("Forgetting and poisoned data are not measured without --tenants.")
    _run_benchmark(
        lambda: run(_built_in_base(), only, _report, tenants=tenants, names=tenant or TENANTS, examples=examples),
        json,
        check,
        record,
        baselines=BASELINES,
    )


def _built_in_base() -> Base:
    from loramill.models.catalog import find_base
    from loramill.models.smollm2 import NAME
    from loramill.settings import Settings

    return find_base(NAME, Settings.load().cache)


def _run_benchmark(
    measure: Callable[[], list[Result]],
    json: Path | None,
    check: bool,
    record: bool = False,
    device: Literal["cpu", "cuda"] = "cpu",
    baselines: Sequence[str] = (),
    other_versions: Sequence[str] = (),
) -> None:
    """Measures; shows and records the results; with `check`, exits with status 1 if a target is missed."""
    from loramill_bench.results_csv import append_results, results_file

    file = results_file(Path.cwd()) if record else None  # fails before anything is measured, not minutes later
    results = measure()
    _show(results, json)
    if file is not None:
        append_results(file, results, device, baselines, other_versions)
    _exit_if_missed(results, check)


def _report(group: str) -> None:
    _print_note(f"Measuring {group}…")


def _print_note(sentence: str) -> None:
    print_message(sentence, style="dim")


def _show(results: Sequence[Result], json: Path | None) -> None:
    print_table(("CASE", "VALUE", "TARGET", "VERDICT", "FLOOR"), map(_row, results), empty="Nothing was measured.")
    if json is not None:
        values = [{**asdict(result), "met": result.met} for result in results]
        json.write_text(encoding.dumps(values, indent=2) + "\n", encoding="utf-8")


def _exit_if_missed(results: Sequence[Result], check: bool) -> None:
    missed = [result.case for result in results if result.met is False]
    if check and missed:
        print_message(f"Missed targets: {'; '.join(missed)}.", style="red")
        raise typer.Exit(1)


def _row(result: Result) -> tuple[Cell, ...]:
    verdict = {True: Text("met", style="green"), False: Text("missed", style="red"), None: Text("-")}[result.met]
    floor = "-" if result.floor is None else f"{result.floor:.3g}"
    value = f"{result.value:.3g}" if abs(result.value) < 1000 else f"{result.value:.0f}"
    return (result.case, f"{value} {result.unit}", result.target_text or "-", verdict, floor)
