"""The metrics of this process, or of all processes that share its folder, in Prometheus' text format."""

# Prometheus' client has no types for the files of several processes.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from pathlib import Path

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from loramill.serve.metrics.definitions import MULTIPROC_DIR, REGISTRY
from loramill.serve.metrics.prometheus_private import read_values, write_values
from loramill.storage.locks import exclusive_lock

#: Content type of what `exposition` returns.
MEDIA_TYPE = CONTENT_TYPE_LATEST

#: Seconds for which the metrics of an ended replica remain; longer than the interval between scrapes.
RETENTION_SECONDS = 600.0


def exposition() -> bytes:
    """The metrics in Prometheus' text format; takes some milliseconds per thousand series."""
    if MULTIPROC_DIR is None:
        return generate_latest(REGISTRY)
    registry = CollectorRegistry()
    # Other processes and threads must not read the files during a merge.
    with exclusive_lock(MULTIPROC_DIR / "lock"):
        merge_dead_processes(MULTIPROC_DIR, older_than=time.time() - RETENTION_SECONDS)
        MultiProcessCollector(registry, str(MULTIPROC_DIR))
        return generate_latest(registry)


def merge_dead_processes(folder: Path, *, older_than: float) -> None:
    """Merges the files of ended processes: their gauges are removed at once, their counts are kept.

    The counts of processes whose end was noticed before `older_than` become one file per kind, of process 0, without
    the series of single replicas: a scrape does not become slower with every process that ever ran.
    """
    ended = [file for file in folder.glob("*.db") if not _is_alive(_pid_of(file))]
    for pid in {_pid_of(file) for file in ended if file.name.startswith("gauge_live")}:
        # The end is noticed for the first time: the files' age is counted from now.
        for file in folder.glob(f"*_{pid}.db"):
            file.touch()
        mark_process_dead(pid, str(folder))
    for kind in ("counter", "histogram"):
        old = [file for file in ended if file.name.startswith(kind) and file.stat().st_mtime < older_than]
        if old:
            _merge_files(old, folder / f"{kind}_0.db")


def _merge_files(files: list[Path], into: Path) -> None:
    totals: defaultdict[str, float] = defaultdict(float)
    for file in files if not into.exists() else [into, *files]:
        for key, value in read_values(file):
            if "replica" not in json.loads(key)[2]:
                totals[key] += value
    merged = into.with_suffix(".new")
    merged.unlink(missing_ok=True)  # left by a merge that was interrupted
    write_values(merged, totals)
    merged.replace(into)
    for file in files:
        file.unlink()


def _pid_of(file: Path) -> int:
    return int(file.stem.rpartition("_")[2])


def _is_alive(pid: int) -> bool:
    if pid == 0:  # the merged file
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, PermissionError):  # of another user: the pid was reused
        return False
    return True
