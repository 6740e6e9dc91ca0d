"""The command line of `benchmarks/gpu.py`; argparse, since a machine with a GPU may have no typer."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryFile

from loramill.errors import InvalidRequest, LoramillError, SetupError
from loramill_bench.gpu import model
from loramill_bench.gpu.bases import has_bitsandbytes
from loramill_bench.gpu.runner import StageReport, run_stage, run_stages
from loramill_bench.gpu.stage import Stage
from loramill_bench.gpu.stages import STAGES
from loramill_bench.kernels import rivals
from loramill_bench.results_csv import COLUMNS, append_results, results_file


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the stages; returns 0 if all passed, 1 if a target was missed or a stage failed, and 2 if nothing ran."""
    options = _parser().parse_args(arguments)
    if options.model:
        _print("\n".join(model.table()))
        return 0
    if options.stage:
        run_stage(_chosen(options.stage)[0], options.out, dry=options.dry)
        return 0
    try:
        stages = _chosen(options.only)
        _check_device(options.dry)
        _make_folder(options.out)
        reports = run_stages(
            stages,
            options.out,
            dry=options.dry,
            seconds=options.seconds,
            print_line=_print,
            script=None if options.dry else sys.argv[0],
        )
        if not options.dry:
            _write_rows(reports, options)
    except LoramillError as error:
        _print(error.message)
        return 2
    missed = [line for report in reports for line in report.missed]
    _print(
        "\n".join(["", f"{len(missed)} of the criteria are missed." if missed else "All criteria are met.", *missed])
    )
    return 1 if missed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gpu.py", description="Check and measure loramill on this machine's GPU: docs/howto/gpu-check.md."
    )
    parser.add_argument(
        "--out", type=Path, default=Path("gpu-results"), help="folder for results (default: %(default)s)"
    )
    parser.add_argument(
        "--only", default="", metavar="STAGES", help=f"only some of {','.join(stage.name for stage in STAGES)}"
    )
    parser.add_argument("--seconds", type=_duration, default=540, help="time for all stages (default: %(default)s)")
    parser.add_argument("--dry", action="store_true", help="test the flow on a CPU with tiny shapes")
    parser.add_argument("--record", action="store_true", help="append the rows to benchmarks/results.csv")
    parser.add_argument("--commit", help="the measured commit, where git is not installed")
    parser.add_argument("--model", action="store_true", help="print the performance model's times, and exit")
    parser.add_argument("--stage", default="", help=argparse.SUPPRESS)
    return parser


def _duration(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of seconds above 0")
    return seconds


def _chosen(names: str) -> list[Stage]:
    """The stages with these names, in their order; all without a name.

    Raises:
        InvalidRequest: there is no such stage.
    """
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    unknown = set(wanted) - {stage.name for stage in STAGES}
    if unknown:
        known = ", ".join(stage.name for stage in STAGES)
        raise InvalidRequest(f"There is no stage '{min(unknown)}'; there are {known}.", param="only")
    return [stage for stage in STAGES if not wanted or stage.name in wanted]


def _check_device(dry: bool) -> None:
    """Raises SetupError if the stages could not run at all."""
    import torch

    if not dry and not torch.cuda.is_available():
        raise SetupError(
            f"torch {torch.__version__} finds no CUDA device: run on a machine with an NVIDIA GPU and a torch built "
            "for CUDA, or give --dry to test the flow on this one."
        )


def _make_folder(folder: Path) -> None:
    """Makes the folder of the results.

    Raises:
        InvalidRequest: it can't be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InvalidRequest(
            f"--out {folder} can't be used for results: {error}. Give a folder that can be written.", param="out"
        ) from error


def _write_rows(reports: Sequence[StageReport], options: argparse.Namespace) -> None:
    """Writes the rows of benchmarks/results.csv: to the folder and, with --record, to that file."""
    results = [result for report in reports for result in report.results]
    baselines = ("transformers", *(("bitsandbytes",) if has_bitsandbytes() else ()))
    own = options.out / "rows.csv"
    own.write_text(",".join(COLUMNS) + "\n", encoding="utf-8")
    for file in (own, results_file(Path(__file__).resolve().parent)) if options.record else (own,):
        append_results(file, results, "cuda", baselines, rivals.versions(), commit=options.commit)


def _print(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
