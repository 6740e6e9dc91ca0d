"""Runs each task in a process of its own, which separates their memory and their failures."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from pydantic import TypeAdapter

from loramill.errors import InvalidRequest
from loramill.pipelines.compare.data import read_task
from loramill.pipelines.compare.types import (
    TITLES,
    TUNINGS,
    Comparison,
    ComparisonOptions,
    ComparisonRow,
    Report,
    Subject,
    Task,
    TaskProgress,
    Tuning,
)
from loramill.serve.replica.replica import resolve_device
from loramill.settings import Settings

#: Characters of a failed process's output that a row keeps.
LOG_CHARACTERS = 4000

#: Without the working folder on its path (-P): it may contain folders with the names of packages.
COMMAND = (sys.executable, "-P", "-m", "loramill.pipelines.compare.worker_process")

#: A line of JSON from a task's process.
PROCESS_OUTPUT: TypeAdapter[TaskProgress | ComparisonRow] = TypeAdapter(TaskProgress | ComparisonRow)


def run_task(task: Task, report: Report = lambda stage: None) -> ComparisonRow:
    """Measures a task, and removes its folder. If the task failed, the row has the error."""
    task.folder.mkdir(parents=True, exist_ok=True)
    try:
        (task.folder / "task.json").write_text(task.model_dump_json(), encoding="utf-8")
        row, code = _run_process(task, report)
        log = (task.folder / "log").read_bytes().decode(errors="replace")[-LOG_CHARACTERS:]
    finally:
        shutil.rmtree(task.folder)  # it may contain a whole model and its checkpoints
    return _failed_row(task, code, log) if row is None else row


def _run_process(task: Task, report: Report) -> tuple[ComparisonRow | None, int]:
    """Runs the task's process to its end; returns the row, if there was one, and the exit code."""
    row = None
    with (task.folder / "task.json").open("rb") as task_file, (task.folder / "log").open("wb") as log:
        # A session of its own: Ctrl-C reaches this process alone, which then kills the task's whole process group.
        process = subprocess.Popen(COMMAND, stdin=task_file, stdout=subprocess.PIPE, stderr=log, start_new_session=True)
    assert process.stdout is not None
    try:
        for line in process.stdout:
            output = PROCESS_OUTPUT.validate_json(line)
            if isinstance(output, ComparisonRow):
                row = output
            else:
                report(output)
        return row, process.wait()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        process.stdout.close()


def _failed_row(task: Task, code: int, written: str) -> ComparisonRow:
    """The row of a process that ended without writing one."""
    last = next((line.strip() for line in reversed(written.splitlines()) if line.strip()), "no output")
    if code == -signal.SIGKILL:
        return ComparisonRow(
            subject=task.subject, error="The process was killed, most likely because memory ran out.", log=written
        )
    return ComparisonRow(subject=task.subject, error=f"The process ended with code {code}: {last}", log=written)


def plan_tasks(settings: Settings, folder: Path, options: ComparisonOptions) -> list[Task]:
    """Returns the tasks of a comparison, the base itself first; their hyperparameters and data are checked.

    Args:
        settings: give the cache, the device and the number of threads.
        folder: parent of the tasks' folders.
        options: what is compared.

    Raises:
        InvalidRequest: a method or a hyperparameter is invalid.
        DatasetInvalid, BaseUnusable: the data or the base cannot be used.
    """
    subjects: list[Subject] = ["base", *dict.fromkeys(_method(name.strip()) for name in options.methods)]
    own: dict[Subject, float] = dict(_rate(text) for text in options.rates)
    for subject in own.keys() - set(subjects):
        raise InvalidRequest(f"--rate names '{subject}', which --methods leaves out.", param="rate")
    fields = options.model_dump(exclude={"methods", "rates"})
    tasks = [
        Task(
            subject=subject,
            cache=settings.cache,
            folder=folder / subject,
            device="cuda" if resolve_device(settings.serve) == "cuda" else "cpu",
            threads=settings.jobs.threads,
            learning_rate=own.get(subject),
            **fields,
        )
        for subject in subjects
    ]
    for task in tasks:
        read_task(task)
    return tasks


def compare_all(tasks: Sequence[Task], following: Callable[[str], AbstractContextManager[Report]]) -> Comparison:
    """Runs all tasks of a plan, one after another.

    Args:
        following: a context for a task's title; it gets the task's progress.
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
        raise InvalidRequest(f"There is no method '{name}'; the methods are {', '.join(TUNINGS)}.", param="methods")
    return known


def _rate(text: str) -> tuple[Tuning, float]:
    name, _, number = text.partition("=")
    try:
        rate = float(number)
    except ValueError:
        rate = 0.0
    if not 0 < rate < 1:
        raise InvalidRequest(
            f"'{text}' is not a method and its learning rate; write for instance lora=5e-4.", param="rate"
        )
    return _method(name), rate
