"""Measures one task in this process: `python -m loramill.pipelines.compare.worker_process`, a child of `run`.

Standard input is the task as JSON; standard output is its progress and, at the end, the row, one JSON per line.
"""

from __future__ import annotations

import os
import sys

from loramill.errors import LoramillError
from loramill.gpus.process import open_gpu
from loramill.pipelines.compare.measure import measure_task
from loramill.pipelines.compare.types import ComparisonRow, Report, Task, TaskProgress


def main() -> None:
    """Measures the task on standard input."""
    # Libraries may write to standard output, so that it is redirected for all but the lines written here.
    output = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def write(value: TaskProgress | ComparisonRow) -> None:
        output.write(value.model_dump_json() + "\n")

    write(row_of(Task.model_validate_json(sys.stdin.read()), write))


def row_of(task: Task, report: Report) -> ComparisonRow:
    """The task's row, with its results or its error."""
    try:
        if task.device == "cuda":
            open_gpu(1.0)
        return measure_task(task, report)
    except LoramillError as error:
        return ComparisonRow(subject=task.subject, error=error.message)


if __name__ == "__main__":
    main()
