"""`loramill-bench`: measures this machine and compares it with targets."""

from __future__ import annotations

import json as encoding
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.text import Text

from loramill.cli import show
from loramill.cli.main import Root
from loramill.logs import quiet_libraries

if TYPE_CHECKING:
    from loramill.models.catalog import Base
    from loramill_bench.measure import Result

Only = Annotated[str, typer.Option(metavar="TEXT", help="Only groups of cases with this in their name.")]
Json = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", dir_okay=False, help="Write the results there, too.")
]
Check = Annotated[bool, typer.Option("--check", help="Exit with 1 if a target is missed.")]
Record = Annotated[bool, typer.Option("--record", help="Add the results to this checkout's benchmarks/results.csv.")]

app = typer.Typer(
    cls=Root, help="Benchmarks: ratios within one process.", no_args_is_help=True, pretty_exceptions_enable=False
)


def main() -> None:
    """Entry point of the command `loramill-bench`."""
    quiet_libraries()
    app()


@app.command()
def kernels(
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Whose kernels.")] = "cpu",
    only: Only = "",
    json: Json = None,
    check: Check = False,
    record: Record = False,
) -> None:
    """Measure the kernels on one thread, about three minutes; medians, against their targets."""
    from loramill_bench.kernels import run

    _carry_out(lambda: run(device, only, _report), json, check, record, device)


@app.command()
def engine(only: Only = "", json: Json = None, check: Check = False, record: Record = False) -> None:
    """Measure the engine on the built-in base and one thread, about eight minutes; medians, against their targets.

    Its rivals are PEFT, transformers' continuous batching and what the machine's memory and arithmetic allow.
    """
    from loramill_bench.engine import RIVALS, run

    _carry_out(lambda: run(_built_in(), only, _report), json, check, record, rivals=RIVALS)


@app.command()
def train(only: Only = "", json: Json = None, check: Check = False, record: Record = False) -> None:
    """Measure training and the queue on the built-in base and one thread, about fifteen minutes, against their targets.

    The rival of a job's speed is PEFT with transformers' Trainer; of what sizing foretells, the memory that is used.
    """
    from loramill_bench.training.train import RIVALS, run

    _carry_out(lambda: run(_built_in(), only, _report), json, check, record, rivals=RIVALS)


@app.command()
def serve(
    vllm: Annotated[
        Path | None,
        typer.Option(
            metavar="PYTHON",
            exists=True,
            dir_okay=False,
            help="One that vLLM is installed for, to measure beside it; without, its cases are left out.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of adapters and requests.")] = 0,
    rounds: Annotated[int, typer.Option(min=1, help="Of each comparison, besides one that warms up.")] = 3,
    only: Only = "",
    json: Json = None,
    check: Check = False,
    record: Record = False,
) -> None:
    """Measure serving over HTTP on the built-in base and all cores, about ten minutes, with vLLM half an hour.

    It starts a `loramill up` of its own. Its rivals are vLLM, the bare engine and a bare replica, against targets.
    """
    from loramill_bench.http import run, vllm_version

    peers = [] if vllm is None else [vllm_version(vllm)]
    _note(f"Beside {peers[0]}." if peers else "Without --vllm nothing is compared with vLLM.")
    _carry_out(
        lambda: run(_built_in(), only, _report, vllm=vllm, seed=seed, rounds=rounds), json, check, record, peers=peers
    )


@app.command()
def soak(
    minutes: Annotated[float, typer.Option(min=0.01, help="Of requests.")] = 30.0,
    seed: Annotated[int, typer.Option(help="Of the requests; when they come depends on the machine.")] = 0,
    json: Json = None,
) -> None:
    """Let the engine serve random requests, cancels, timeouts and failing loads for long, and look for faults.

    Exits with 1 if an answer is lost, late, given twice or not what it is alone, if the books don't add up, or if
    memory grows.
    """
    from loramill_bench.engine.soak import soak as run

    _carry_out(lambda: run(_built_in(), 60 * minutes, _note, seed=seed), json, check=True)


@app.command()
def quality(
    tenants: Annotated[
        Path, typer.Option(metavar="FOLDER", exists=True, file_okay=False, help="Of tenants' folders with real data.")
    ],
    only: Only = "",
    json: Json = None,
    check: Check = False,
) -> None:
    """Train the built-in base on real tenants with a job's defaults, for an hour, and judge the test answers."""
    from loramill.settings import Settings
    from loramill_bench.quality import results

    _carry_out(lambda: results(tenants, Settings.load(), only, _report), json, check)


def _built_in() -> Base:
    from loramill.models.catalog import find_base
    from loramill.models.smollm2 import NAME
    from loramill.settings import Settings

    return find_base(NAME, Settings.load().cache)


def _carry_out(
    measure: Callable[[], list[Result]],
    json: Path | None,
    check: bool,
    record: bool = False,
    device: Literal["cpu", "cuda"] = "cpu",
    rivals: Sequence[str] = (),
    peers: Sequence[str] = (),
) -> None:
    """Measures, then shows, records and judges the results."""
    from loramill_bench.record import append, results_file

    file = results_file(Path.cwd()) if record else None  # minutes later would be too late to find out
    results = measure()
    _show(results, json)
    if file is not None:
        append(file, results, device, rivals, peers)
    _judge(results, check)


def _report(group: str) -> None:
    _note(f"Measuring {group}…")


def _note(sentence: str) -> None:
    show.print_message(sentence, style="dim")


def _show(results: Sequence[Result], json: Path | None) -> None:
    show.print_table(("CASE", "VALUE", "TARGET", "VERDICT", "FLOOR"), map(_row, results), empty="Nothing was measured.")
    if json is not None:
        values = [{**asdict(result), "met": result.met} for result in results]
        json.write_text(encoding.dumps(values, indent=2) + "\n", encoding="utf-8")


def _judge(results: Sequence[Result], check: bool) -> None:
    missed = [result.case for result in results if result.met is False]
    if check and missed:
        show.print_message(f"Missed targets: {'; '.join(missed)}.", style="red")
        raise typer.Exit(1)


def _row(result: Result) -> tuple[show.Cell, ...]:
    verdict = {True: Text("met", style="green"), False: Text("missed", style="red"), None: Text("-")}[result.met]
    floor = "-" if result.floor is None else f"{result.floor:.3g}"
    value = f"{result.value:.3g}" if abs(result.value) < 1000 else f"{result.value:.0f}"
    return (result.case, f"{value} {result.unit}", result.goal or "-", verdict, floor)
