"""Runs each task in a process of its own: its memory is then its own, and so is its failure."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from loramill.errors import InvalidRequest
from loramill.pipelines.compare.data import read_task
from loramill.pipelines.compare.types import (
    TITLES,
    TUNINGS,
    Comparison,
    ComparisonRow,
    Report,
    Subject,
    Task,
    TaskProgress,
    Tuning,
)
from loramill.serve.replica.replica import resolve_device
from loramill.settings import Settings

#: Of what a failed process wrote, what a row keeps.
LOG_CHARACTERS = 4000

#: Without the working folder on its path (-P): it may hold folders that are called as packages are.
COMMAND = (sys.executable, "-P", "-m", "loramill.pipelines.compare.worker_process")

#: What a task's process writes: a line of JSON each.
PROCESS_OUTPUT: TypeAdapter[TaskProgress | ComparisonRow] = TypeAdapter(TaskProgress | ComparisonRow)


def run_task(task: Task, report: Report = lambda stage: None) -> ComparisonRow:
    """Measures a task, and removes its folder; the row says so if it failed, however it did."""
    task.folder.mkdir(parents=True, exist_ok=True)
    try:
        (task.folder / "task.json").write_text(task.model_dump_json(), encoding="utf-8")
        row, code = _run_process(task, report)
        log = (task.folder / "log").read_bytes().decode(errors="replace")[-LOG_CHARACTERS:]
    finally:
        shutil.rmtree(task.folder)  # a whole model and its checkpoints, perhaps
    return _failed_row(task, code, log) if row is None else row


def _run_process(task: Task, report: Report) -> tuple[ComparisonRow | None, int]:
    """Runs the task's process to its end; the row, if there was one, and the exit code."""
    row = None
    with (task.folder / "task.json").open("rb") as asked, (task.folder / "log").open("wb") as log:
        # In a session of its own: Ctrl-C is for this process alone, and what the task's started ends with it.
        process = subprocess.Popen(COMMAND, stdin=asked, stdout=subprocess.PIPE, stderr=log, start_new_session=True)
    assert process.stdout is not None
    try:
        for line in process.stdout:
            said = PROCESS_OUTPUT.validate_json(line)
            if isinstance(said, ComparisonRow):
                row = said
            else:
                report(said)
        return row, process.wait()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        process.stdout.close()


def _failed_row(task: Task, code: int, written: str) -> ComparisonRow:
    """The row of a process that ended without one."""
    last = next((line.strip() for line in reversed(written.splitlines()) if line.strip()), "it wrote nothing")
    if code == -signal.SIGKILL:
        return ComparisonRow(
            subject=task.subject, error="Its process was killed: memory ran out, most likely.", log=written
        )
    return ComparisonRow(subject=task.subject, error=f"Its process ended with code {code}: {last}", log=written)


def plan_tasks(
    settings: Settings,
    folder: Path,
    *,
    methods: Sequence[str],
    rates: Sequence[str] = (),
    **said: Any,
) -> list[Task]:
    """The tasks of a comparison: the base as it is, then each method; their numbers and data are all checked.

    Args:
        folder: for what they leave behind.
        methods: names of `TUNINGS`, in order.
        rates: learning rates, as "lora=5e-4".
        said: the other fields of `Task`.

    Raises:
        InvalidRequest: a method or a number makes no sense.
        DatasetInvalid, BaseUnusable: of the data or the base.
    """
    subjects: list[Subject] = ["base", *dict.fromkeys(_method(name.strip()) for name in methods)]
    own: dict[Subject, float] = dict(_rate(text) for text in rates)
    for subject in own.keys() - set(subjects):
        raise InvalidRequest(f"--rate names '{subject}', which --methods leaves out.", param="rate")
    tasks = [
        Task(
            subject=subject,
            cache=settings.cache,
            folder=folder / subject,
            device="cuda" if resolve_device(settings.serve) == "cuda" else "cpu",
            threads=settings.jobs.threads,
            learning_rate=own.get(subject),
            **said,
        )
        for subject in subjects
    ]
    for task in tasks:
        read_task(task)
    return tasks


def compare_all(tasks: Sequence[Task], following: Callable[[str], AbstractContextManager[Report]]) -> Comparison:
    """Runs all tasks of a plan, one after another.

    Args:
        following: entered with a task's title while it runs; hears its stages.
    """
    rows = []
    for task in tasks:
        with following(TITLES[task.subject]) as report:
            rows.append(run_task(task, report))
    first = tasks[0]
    return Comparison(
        base=first.base,
        device=first.device,
        threads=first.threads,
        seed=first.seed,
        train=str(first.train),
        test=str(first.test),
        rows=tuple(rows),
    )


def _method(name: str) -> Tuning:
    known = next((tuning for tuning in TUNINGS if tuning == name), None)
    if known is None:
        raise InvalidRequest(f"There is no method '{name}'; there are {', '.join(TUNINGS)}.", param="methods")
    return known


def _rate(text: str) -> tuple[Tuning, float]:
    name, _, number = text.partition("=")
    try:
        rate = float(number)
    except ValueError:
        rate = 0.0
    if not 0 < rate < 1:
        raise InvalidRequest(f"'{text}' gives no method a learning rate; write for instance lora=5e-4.", param="rate")
    return _method(name), rate
