"""All metrics of this process, or of all processes that share its folder, as Prometheus reads them."""

# Prometheus' client has no types where processes share a folder.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import fcntl
import json
import os
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.mmap_dict import MmapedDict
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from loramill.serve.metrics.definitions import MULTIPROC_DIR, REGISTRY

#: What `exposition` returns.
MEDIA_TYPE = CONTENT_TYPE_LATEST

#: Seconds that the numbers of an ended replica are still told; scrapes are closer together.
RETENTION_SECONDS = 600.0


def exposition() -> bytes:
    """The metrics in Prometheus' text format; takes some milliseconds a thousand series."""
    if MULTIPROC_DIR is None:
        return generate_latest(REGISTRY)
    registry = CollectorRegistry()
    with _exclusive_lock(MULTIPROC_DIR):
        merge_dead_processes(MULTIPROC_DIR, older_than=time.time() - RETENTION_SECONDS)
        MultiProcessCollector(registry, str(MULTIPROC_DIR))
        return generate_latest(registry)


def merge_dead_processes(folder: Path, *, older_than: float) -> None:
    """Takes in what ended processes left: what they were doing goes at once, what they counted is kept.

    The counts of those whose end was seen before `older_than` become one file of each kind, of process 0, without what
    belonged to one replica: no scrape gets dearer with every process that ever ran.
    """
    ended = [file for file in folder.glob("*.db") if not _is_alive(_pid_of(file))]
    for process in {_pid_of(file) for file in ended if file.name.startswith("gauge_live")}:
        # Its end is seen for the first time: from now on counts how long ago it was.
        for file in folder.glob(f"*_{process}.db"):
            file.touch()
        mark_process_dead(process, str(folder))
    for kind in ("counter", "histogram"):
        old = [file for file in ended if file.name.startswith(kind) and file.stat().st_mtime < older_than]
        if old:
            _merge_files(old, folder / f"{kind}_0.db")


def _merge_files(files: list[Path], into: Path) -> None:
    totals: defaultdict[str, float] = defaultdict(float)
    for file in files if not into.exists() else [into, *files]:
        for key, value, _, _ in MmapedDict.read_all_values_from_file(str(file)):
            if "replica" not in json.loads(key)[2]:
                totals[key] += value
    merged = into.with_suffix(".new")
    merged.unlink(missing_ok=True)  # of a merge that was cut short
    values = MmapedDict(str(merged))
    for key, value in totals.items():
        values.write_value(key, value, 0.0)
    values.close()
    merged.replace(into)
    for file in files:
        file.unlink()


def _pid_of(file: Path) -> int:
    return int(file.stem.rpartition("_")[2])


def _is_alive(process: int) -> bool:
    if process == 0:  # what was merged
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, PermissionError):  # of another user's: the number was given away anew
        return False
    return True


@contextmanager
def _exclusive_lock(folder: Path) -> Iterator[None]:
    """Keeps other processes and threads from reading what is half merged."""
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
