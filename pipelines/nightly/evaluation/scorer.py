"""A user's Python function as a metric; it runs in a process of its own, so that a crash affects no one else."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

from loramill.durations import format_duration
from loramill.errors import EvaluationError
from loramill.pipelines.nightly.evaluation import scorer_process
from loramill.pipelines.nightly.evaluation.items import AnsweredExample


def score_with(function: str, answered: Sequence[AnsweredExample], limit: timedelta) -> list[float]:
    """Scores answers, each 0 to 1, by a function of a user.

    Args:
        function: `package.module:function`, which must be importable, or `/folder/file.py:function`.
        answered: examples with answers.
        limit: time for all of them; then the process and its children are killed.

    Raises:
        EvaluationError: the function cannot be loaded, raises, returns something else than a number from 0 to 1, or
            takes too long.
    """
    lines = [
        json.dumps({"question": each.question, "reference": each.example.completion, "answer": each.answer})
        for each in answered
    ]
    output, log = _run(function, "".join(f"{line}\n" for line in lines), limit)
    results = [json.loads(line) for line in output.splitlines()]
    if results and (error := results[-1].get("error")):
        raise EvaluationError(f"The scorer {function} failed on answer {len(results)} of {len(lines)}: {error}.")
    if len(results) < len(lines):
        last = (log.strip().splitlines() or ["it printed nothing"])[-1]
        raise EvaluationError(
            f"The scorer {function} ended after {len(results)} of {len(lines)} answers; the last line that it printed: "
            f"{last:.200}"
        )
    return [float(each["score"]) for each in results]


def _run(function: str, lines: str, limit: timedelta) -> tuple[str, str]:
    """Standard output and standard error of the process."""
    with subprocess.Popen(
        # -P: this folder's modules do not hide the user's.
        [sys.executable, "-P", str(Path(scorer_process.__file__)), function],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            return process.communicate(lines, timeout=limit.total_seconds())
        except BaseException as error:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with its children
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            raise EvaluationError(
                f"The scorer {function} took longer than {format_duration(limit.total_seconds())} for "
                f"{lines.count(chr(10))} answers; make it faster, or raise evaluate.scorer_time_limit."
            ) from error
