"""A job's results file, as OpenAI's API has it: a CSV of its metrics, made of its history whenever it is read."""

from __future__ import annotations

import csv
import io

from sqlalchemy.orm import Session

from loramill.names import RESULTS_ID_PREFIX
from loramill.registry.jobs import history

FILENAME = "step_metrics.csv"

_COLUMNS = (
    "step",
    "train_loss",
    "train_mean_token_accuracy",
    "valid_loss",
    "valid_mean_token_accuracy",
    "learning_rate",
    "grad_norm",
    "trained_tokens",
    "tokens_per_second",
)


def job_id_of(file_id: str) -> str | None:
    """The job whose results have this id; None: it is no results file's id."""
    return file_id.removeprefix(RESULTS_ID_PREFIX) if file_id.startswith(RESULTS_ID_PREFIX) else None


def metrics_csv(session: Session, job_id: str) -> bytes:
    """The CSV: a line for each step that has metrics; what wasn't measured at a step is empty."""
    text = io.StringIO()
    table = csv.DictWriter(text, _COLUMNS, extrasaction="ignore", lineterminator="\n")
    table.writeheader()
    table.writerows(history.metrics(session, job_id))
    return text.getvalue().encode()
