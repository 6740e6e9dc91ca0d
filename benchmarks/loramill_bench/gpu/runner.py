"""Runs the stages one after another, each in a process of its own, and reports what passed."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from loramill_bench.gpu import journal
from loramill_bench.gpu.criteria import judge
from loramill_bench.gpu.journal import Journal
from loramill_bench.gpu.stage import Context, Stage
from loramill_bench.results import Result

#: A stage is ended after this multiple of its budget, and left out with less than this part of it.
_OVERRUN, _LEAST = 1.5, 0.4
#: Seconds in which a process ends that was killed.
_ENDING = 10.0


@dataclass(frozen=True, slots=True)
class StageReport:
    """How a stage ended.

    Attributes:
        stage: its name.
        results: its cases, with targets.
        notes: its remarks.
        failure: why it ended early or was left out; None if it did not.
        seconds: its duration.
    """

    stage: str
    results: tuple[Result, ...]
    notes: tuple[str, ...]
    failure: str | None
    seconds: float

    @property
    def missed(self) -> list[str]:
        """The cases that missed their targets, and the failure."""
        missed = [each for each in self.results if each.met is False or math.isnan(each.value)]
        cases = [f"{each.case}: {each.value:.4g} {each.unit}{_target(each)}" for each in missed]
        return cases if self.failure is None else [*cases, f"{self.stage}: {self.failure.strip().splitlines()[-1]}"]


def run_stages(
    stages: Sequence[Stage],
    folder: Path,
    *,
    dry: bool,
    seconds: float,
    print_line: Callable[[str], object],
    script: str | None,
) -> list[StageReport]:
    """Runs the stages within a time, and writes results.json into the folder after each.

    Args:
        stages: the stages.
        folder: for all files.
        dry: see `Context`.
        seconds: time for all of them.
        print_line: shows a line to the user.
        script: runs a stage in a process of its own, so that one that crashes, hangs or breaks the GPU's context does
            not touch the others; None: all run in this process.
    """
    end = time.monotonic() + seconds
    reports: list[StageReport] = []
    for stage in stages:
        left = end - time.monotonic()
        print_line(f"{stage.name} ({left:.0f} s left)")
        reports.append(_report(stage, folder, dry, left, script))
        for line in _lines(reports[-1]):
            print_line(line)
        text = json.dumps([_as_json(report) for report in reports], indent=1)
        (folder / "results.json").write_text(text + "\n", encoding="utf-8")
    return reports


def run_stage(stage: Stage, folder: Path, *, dry: bool) -> None:
    """Runs a stage in this process; appends what it finds to its journal, also if it fails."""
    file = _journal_file(folder, stage)
    context = Context(dry, folder, lambda text: journal.append(file, {"note": text}))
    begun = time.monotonic()
    try:
        for result in stage.measure(context):
            journal.append(file, result)
    except Exception:  # noqa: BLE001 - the other stages run whatever it is
        journal.append(file, {"failure": traceback.format_exc()})
    journal.append(file, {"seconds": time.monotonic() - begun})


def _report(stage: Stage, folder: Path, dry: bool, left: float, script: str | None) -> StageReport:
    file = _journal_file(folder, stage)
    file.unlink(missing_ok=True)
    if left < _LEAST * stage.budget:
        return StageReport(stage.name, (), (), f"left out: {left:.0f} s were left of {stage.budget:.0f} s", 0.0)
    begun = time.monotonic()
    ended = None
    if script is None:
        run_stage(stage, folder, dry=dry)
    else:
        command = [sys.executable, script, "--out", str(folder), "--stage", stage.name, *["--dry"] * dry]
        ended = _run(command, folder / f"{stage.name}.log", min(left, _OVERRUN * stage.budget))
    found: Journal = journal.read(file)
    results = tuple(judge(found.results, dry=dry))
    failure = found.failure or ended
    return StageReport(stage.name, results, tuple(found.notes), failure, found.seconds or time.monotonic() - begun)


def _run(command: Sequence[str], log: Path, timeout: float) -> str | None:
    """Runs a stage's process; returns how it ended, if it did not end by itself."""
    with log.open("w", encoding="utf-8") as opened:
        process = subprocess.Popen(command, stdout=opened, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        status = process.wait(timeout)
    except subprocess.TimeoutExpired:
        return f"ended after {timeout:.0f} s; see {log}"
    finally:
        _end_group(process)
    return None if status == 0 else f"its process ended with status {status}; see {log}"


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and those that it has started, which would use the GPU during the next stages."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    # A process that waits for a GPU's driver may not end.
    with suppress(subprocess.TimeoutExpired):
        process.wait(_ENDING)


def _journal_file(folder: Path, stage: Stage) -> Path:
    return folder / f"{stage.name}.jsonl"


def _lines(report: StageReport) -> list[str]:
    lines = [f"       {note}" for note in report.notes]
    for result in report.results:
        verdict = {True: "ok    ", False: "MISSED", None: "      "}[result.met]
        lines.append(f"{verdict} {result.case} = {result.value:.4g} {result.unit}{_target(result)}")
    if report.failure is not None:
        lines.append(f"FAILED {report.stage}: {report.failure.strip()}")
    return lines


def _target(result: Result) -> str:
    floor = "" if result.floor is None else f", floor {result.floor:.4g}"
    return f" ({result.target_text}{floor})" if result.target_text else ""


def _as_json(report: StageReport) -> dict[str, object]:
    results = [{**asdict(result), "met": result.met} for result in report.results]
    return {**asdict(report), "results": results}
