"""Evaluations: metrics of a version, or of the base alone, on held-out examples, and their results per example."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from loramill.names import AdapterName
from loramill.registry import ArtifactStore, adapters
from loramill.registry.database.tables import EvaluationRow
from loramill.types import EvaluationRecord, ExampleResult

_RESULTS_FILE, _LEFT_FILE = "results.jsonl", "left.json"


def add(
    session: Session,
    name: AdapterName | str,
    version: str | None,
    dataset: str,
    slice: str,  # noqa: A002
    examples: int,
    metrics: Mapping[str, float],
    results: str | None = None,
) -> EvaluationRecord:
    """Records the metrics (finite numbers) of a version, or of the base (None), on `examples` examples of a dataset.

    Args:
        results: from `store_results`; kept as long as an evaluation refers to it.

    Raises:
        NotFound: the adapter does not exist.
    """
    adapters.get(session, name)
    row = EvaluationRow(
        adapter=str(name),
        version=version,
        dataset=dataset,
        slice=slice,
        examples=examples,
        metrics=dict(metrics),
        results=results,
        created_at=time.time(),
    )
    session.add(row)
    session.flush()
    return EvaluationRecord.model_validate(row)


def list_evaluations(session: Session, name: AdapterName | str) -> list[EvaluationRecord]:
    """Returns the evaluations of an adapter, newest first."""
    statement = select(EvaluationRow).where(EvaluationRow.adapter == str(name)).order_by(EvaluationRow.id.desc())
    return [EvaluationRecord.model_validate(row) for row in session.scalars(statement)]


def store_results(
    artifacts: ArtifactStore, results: Sequence[ExampleResult], left: Mapping[str, Sequence[str]] | None = None
) -> str:
    """Stores results per example as JSONL, and returns the artifact's hash for `add`.

    Args:
        artifacts: the store.
        results: the results.
        left: hashes of the examples that were not evaluated, by slice.

    Raises:
        DiskFull, StoreUnusable, Unavailable: as `ArtifactStore.put`.
    """
    files = {_RESULTS_FILE: "".join(f"{each.model_dump_json()}\n" for each in results).encode()}
    if left:
        files[_LEFT_FILE] = json.dumps(left).encode()
    return artifacts.put(files)


def read_left(artifacts: ArtifactStore, artifact: str) -> dict[str, tuple[str, ...]]:
    """Reads the hashes of the examples that were not evaluated, by slice.

    Raises:
        ArtifactMissing, ArtifactCorrupt, StoreUnusable, Unavailable: as `ArtifactStore.read`.
    """
    if _LEFT_FILE not in artifacts.manifest(artifact).files:
        return {}
    left = json.loads(artifacts.read(artifact, _LEFT_FILE))
    return {name: tuple(each) for name, each in left.items()}


def read_results(artifacts: ArtifactStore, artifact: str) -> list[ExampleResult]:
    """Reads what `store_results` stored.

    Raises:
        ArtifactMissing, ArtifactCorrupt, StoreUnusable, Unavailable: as `ArtifactStore.read`.
    """
    # Not splitlines(): JSON leaves characters such as U+2028 in an answer as they are.
    lines = artifacts.read(artifact, _RESULTS_FILE).decode().split("\n")
    return [ExampleResult.model_validate_json(line) for line in lines if line]
