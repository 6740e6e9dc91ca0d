"""Metrics: names, labels, engine statistics, and the sums over processes, including killed ones."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from loramill.errors import InvalidRequest
from loramill.names import check_name
from loramill.serve.engine import EngineStats
from loramill.serve.engine.durations import BOUNDS_SECONDS, DurationHistogram, Durations
from loramill.serve.metrics import multiprocess
from loramill.serve.metrics.definitions import OTHER_LABEL, REGISTRY, BoundedLabels
from loramill.serve.metrics.engine import EngineMetrics


def read(text: bytes) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """All samples of an exposition by name and sorted labels."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def of(text: bytes, name: str, **labels: str) -> float | None:
    return read(text).get((name, tuple(sorted(labels.items()))))


# -- labels ------------------------------------------------------------------------------------------------------------


@given(st.lists(st.text(max_size=3)), st.integers(0, 5))
def test_labels_are_bounded_and_stable(names: list[str], most: int) -> None:
    label = BoundedLabels(most)
    first = {name: label(name) for name in reversed(names)} | {name: label(name) for name in names}
    assert {name: label(name) for name in names} == first
    own = set(first.values()) - {OTHER_LABEL}
    assert len(own) <= most and all(first[name] in (name, OTHER_LABEL) for name in names)
    assert OTHER_LABEL not in first.values() or len(own) == most or OTHER_LABEL in names


def test_the_first_names_get_labels_of_their_own() -> None:
    label = BoundedLabels(2)
    assert [label(name) for name in ("b", "a", "c", "b", "d", "a")] == ["b", "a", OTHER_LABEL, "b", OTHER_LABEL, "a"]


def test_no_tenant_can_have_the_name_of_a_shared_label() -> None:
    with pytest.raises(InvalidRequest):
        check_name(OTHER_LABEL, "tenant")


def test_names_follow_the_conventions_of_prometheus() -> None:
    families = list(REGISTRY.collect())
    assert len(families) > 25
    for family in families:
        assert family.name.startswith("loramill_") and family.documentation.endswith(".")
        assert not family.name.endswith(("_total", "_count", "_sum", "_bucket"))
        assert (family.type == "histogram") == family.name.endswith("_seconds")


# -- an engine's numbers -----------------------------------------------------------------------------------------------

STATS = EngineStats(
    waiting=3,
    running=5,
    blocks=100,
    free_blocks=30,
    slots=8,
    resident=("a", "b"),
    loading=("c",),
    adapter_bytes=2000,
    host_bytes=700,
    steps=40,
    computed_tokens=900,
    reused_tokens=64,
    generated_tokens=200,
    preemptions=1,
    loads=4,
    load_failures=2,
    evictions=1,
    failed_captures=5,
)


def durations(*seconds: float) -> Durations:
    histogram = DurationHistogram()
    for each in seconds:
        histogram.observe(each)
    return histogram.durations


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("engine_waiting", 3, 0),
        ("engine_running", 5, 6),
        ("kv_blocks", 100, 100),
        ("kv_blocks_used", 70, 70),
        ("adapter_slots", 8, 8),
        ("adapter_slots_used", 3, 2),
        ("adapter_bytes", 2000, 2000),
        ("adapter_host_bytes", 700, 700),
        ("engine_steps_total", 40, 45),
        ("engine_computed_tokens_total", 900, 900),
        ("prefix_cache_reused_tokens_total", 64, 64),
        ("engine_generated_tokens_total", 200, 230),
        ("engine_preemptions_total", 1, 1),
        ("adapter_loads_total", 4, 4),
        ("adapter_load_failures_total", 2, 2),
        ("adapter_evictions_total", 1, 3),
        ("graph_capture_failures_total", 5, 5),
    ],
)
def test_an_engines_statistics_are_exported(name: str, first: int, second: int) -> None:
    replica = f"exported {name}"
    engine = EngineMetrics(replica)
    engine.update(STATS)
    assert of(generate_latest(REGISTRY), f"loramill_{name}", replica=replica) == first
    later = replace(STATS, waiting=0, running=6, loading=(), steps=45, generated_tokens=230, evictions=3)
    for _ in range(2):  # a second update counts nothing twice
        engine.update(later)
        assert of(generate_latest(REGISTRY), f"loramill_{name}", replica=replica) == second


def test_replicas_are_separate() -> None:
    for replica, running in (("separate 1", 3), ("separate 2", 4)):
        EngineMetrics(replica).update(replace(STATS, running=running))
    text = generate_latest(REGISTRY)
    assert of(text, "loramill_engine_running", replica="separate 1") == 3
    assert of(text, "loramill_engine_running", replica="separate 2") == 4


@given(st.lists(st.floats(0, 100)))
def test_a_histogram_counts_by_bounds(seconds: list[float]) -> None:
    counted = durations(*seconds)
    assert [sum(counted.counts[: i + 1]) for i in range(len(BOUNDS_SECONDS))] == [
        sum(each <= bound for each in seconds) for bound in BOUNDS_SECONDS
    ]
    assert sum(counted.counts) == len(seconds) and counted.total_seconds == pytest.approx(sum(seconds))


def test_durations_become_a_histogram() -> None:
    before, after = (0.0, 0.001, 0.3), (0.0011, 30.0, 31.0, 0.3)
    engine = EngineMetrics("timed")
    engine.update(EngineStats(queue_times=durations(*before)))
    engine.update(EngineStats(queue_times=durations(*before, *after), load_times=durations(0.2)))
    seen = read(generate_latest(REGISTRY))
    for bound in BOUNDS_SECONDS:
        key = ("loramill_engine_queue_seconds_bucket", (("le", str(bound)), ("replica", "timed")))
        assert seen[key] == sum(each <= bound for each in (*before, *after))
    timed = (("replica", "timed"),)
    assert seen["loramill_engine_queue_seconds_count", timed] == 7
    assert seen["loramill_engine_queue_seconds_sum", timed] == pytest.approx(sum(before) + sum(after))
    assert seen["loramill_adapter_load_seconds_count", timed] == 1
    assert seen["loramill_engine_step_seconds_count", timed] == 0


# -- several processes -------------------------------------------------------------------------------------------------

GATEWAY = """
from loramill.serve.metrics import definitions as metrics
metrics.REQUESTS.labels("chat", "acme", "acme/support", 200).inc(3)
metrics.FIRST_TOKEN.labels("acme", "acme/support").observe(0.2)
metrics.IN_FLIGHT.inc(2)
"""
REPLICA = """
from loramill.serve.engine import EngineStats
from loramill.serve.metrics.engine import EngineMetrics
EngineMetrics("r1").update(EngineStats(running=4, steps=7))
"""

#: Counts as a replica does, without the seconds that an engine takes to import.
OLD_REPLICA = """
from prometheus_client import Counter
from loramill.serve.metrics.definitions import REGISTRY
Counter("loramill_engine_steps", "Steps.", ("replica",), registry=REGISTRY).labels("r1").inc(7)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that `exposition` reads."""
    monkeypatch.setattr(multiprocess, "MULTIPROC_DIR", tmp_path / "metrics")
    return tmp_path / "metrics"


@pytest.fixture
def start(folder: Path) -> Iterator[Callable[[str], subprocess.Popen[bytes]]]:
    """Starts a process that counts something, and waits until it has."""
    started: list[subprocess.Popen[bytes]] = []

    def make(script: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-c", f"{script}\nprint(flush=True)\ninput()"],
            env={**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(folder)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        started.append(process)
        assert process.stdout is not None and process.stdout.readline() == b"\n"
        return process

    yield make
    for process in started:
        process.kill()
        process.communicate()


def killed(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()


def shown() -> tuple[float | None, ...]:
    """Requests, first tokens, those in flight, the replica's steps and running answers."""
    text = multiprocess.exposition()
    return (
        of(text, "loramill_requests_total", endpoint="chat", tenant="acme", adapter="acme/support", code="200"),
        of(text, "loramill_time_to_first_token_seconds_bucket", tenant="acme", adapter="acme/support", le="0.25"),
        of(text, "loramill_requests_in_flight"),
        of(text, "loramill_engine_steps_total", replica="r1"),
        of(text, "loramill_engine_running", replica="r1"),
    )


def test_processes_are_summed_and_a_killed_one_keeps_its_counts(start, folder: Path) -> None:
    first, replica = start(GATEWAY), start(REPLICA)
    assert shown() == (3, 1, 2, 7, 4)
    second = start(GATEWAY)
    assert shown() == (6, 2, 4, 7, 4)
    killed(first)
    assert shown() == (6, 2, 2, 7, 4)
    killed(replica)
    assert shown() == (6, 2, 2, 7, None)
    assert not list(folder.glob(f"gauge_live*_{first.pid}.db"))

    # Long afterwards their files are merged, and later ones join them; a dead replica's own series are gone.
    before = set(folder.glob("*.db"))
    for rounds in (1, 2):
        multiprocess.merge_dead_processes(folder, older_than=float("inf"))
        assert shown() == (3 + 3 * rounds, 1 + rounds, 2, None, None)
        assert {file.name for file in folder.glob("*_0.db")} == {"counter_0.db", "histogram_0.db"}
        killed(start(GATEWAY))
    assert {int(file.stem.rpartition("_")[2]) for file in before & set(folder.glob("*.db"))} == {second.pid}


def test_an_ended_process_is_exposed_for_a_while(start, folder: Path) -> None:
    process = start(OLD_REPLICA)
    killed(process)
    old = folder / f"counter_{process.pid}.db"
    os.utime(old, (0, 0))  # it has counted nothing for a long time
    for _ in range(2):
        assert shown()[3] == 7
    os.utime(old, (0, 0))  # it ended long ago
    assert shown()[3] is None
    assert not old.exists()


def test_an_interrupted_merge_does_no_harm(start, folder: Path) -> None:
    killed(start(GATEWAY))
    (folder / "counter_0.new").write_bytes(b"half")
    multiprocess.merge_dead_processes(folder, older_than=float("inf"))
    assert shown()[:3] == (3, 1, None)
