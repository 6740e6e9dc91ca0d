"""prometheus_client's private API: all of it that loramill uses, as of 0.26 (tests/test_private_apis.py compares)."""

# Prometheus' client has no types for the files of several processes.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from prometheus_client import Histogram
from prometheus_client.mmap_dict import MmapedDict


class PrecountedHistogram(Histogram):
    """A histogram of durations that were counted elsewhere, in the same buckets."""

    def add_counts(self, counts: Sequence[int], seconds: float) -> None:
        """Adds a count to each bucket, and the sum of the durations."""
        for bucket, count in zip(self._buckets, counts, strict=True):
            bucket.inc(count)
        self._sum.inc(seconds)


def read_values(file: Path) -> Iterator[tuple[str, float]]:
    """The metrics in a process's file: keys in JSON (metric, sample, labels, help), and values."""
    return ((key, value) for key, value, _, _ in MmapedDict.read_all_values_from_file(str(file)))


def write_values(file: Path, values: Mapping[str, float]) -> None:
    """Writes metrics to a new file, as `read_values` reads them."""
    written = MmapedDict(str(file))
    for key, value in values.items():
        written.write_value(key, value, 0.0)
    written.close()
