"""The results file of a job, as in OpenAI's API: a CSV of its metrics, generated on each read."""

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
#: Columns of preference tuning only.
_REWARD_COLUMNS = tuple(
    f"{prefix}rewards/{name}" for prefix in ("", "valid_") for name in ("chosen", "rejected", "margins", "accuracies")
)


def job_id_of(file_id: str) -> str | None:
    """Returns the ID of the job whose results file has this ID; None if it is not the ID of a results file."""
    return file_id.removeprefix(RESULTS_ID_PREFIX) if file_id.startswith(RESULTS_ID_PREFIX) else None


def metrics_csv(session: Session, job_id: str) -> bytes:
    """Returns the CSV: one line per step with metrics; values that were not measured at a step are empty."""
    text, rows = io.StringIO(), history.metrics(session, job_id)
    rewards = [name for name in _REWARD_COLUMNS if any(name in row for row in rows)]
    table = csv.DictWriter(text, [*_COLUMNS, *rewards], extrasaction="ignore", lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    return text.getvalue().encode()
