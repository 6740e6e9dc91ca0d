"""One task, measured in this process: `python -m loramill.pipelines.compare.worker_process`, a child of `run`.

Standard input holds the task as JSON; standard output tells how far it is, and at last the row.
"""

from __future__ import annotations

import os
import sys

from loramill.errors import LoramillError
from loramill.pipelines.compare.measure import measure_task
from loramill.pipelines.compare.types import ComparisonRow, Report, Task, TaskProgress


def main() -> None:
    """Measures the task that standard input holds."""
    # Libraries write to standard output whatever they like: it is kept apart for what is said here.
    told = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def tell(said: TaskProgress | ComparisonRow) -> None:
        told.write(said.model_dump_json() + "\n")

    tell(row_of(Task.model_validate_json(sys.stdin.read()), tell))


def row_of(task: Task, report: Report) -> ComparisonRow:
    """The task's row, of its figures or of the error that kept it from any."""
    try:
        return measure_task(task, report)
    except LoramillError as error:
        return ComparisonRow(subject=task.subject, error=error.message)


if __name__ == "__main__":
    main()
