"""Routes: a table of cases, properties, and simulated replicas compared with the fewest possible loads."""

from __future__ import annotations

from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramill.serve.routing.policy import (
    LOAD_FACTOR,
    SLACK_REQUESTS,
    Candidate,
    RecentDispatches,
    ReplicaReport,
    report_stats,
    route,
)

from .simulation import Arrival, clairvoyant, informed, play, zipf

NAMES = "abcde"

candidates = st.lists(
    st.builds(
        Candidate,
        st.sampled_from([f"replica-{number}" for number in range(8)]),
        st.integers(0, 60),
        st.booleans(),
        st.integers(-2, 8),
    ),
    max_size=8,
    unique_by=lambda candidate: candidate.replica,
)
versions = st.none() | st.sampled_from(["v1", "v2", "v3"])


def homes(version: str, names: str = NAMES) -> tuple[str, ...]:
    """The order of replicas without requests."""
    return route(version, [Candidate(name, 0) for name in names])


A, B, C, *_ = homes("v")


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        ([Candidate(C, 5, has_adapter=True), Candidate(A, 0), Candidate(B, 0)], C),
        ([Candidate(C, 5, has_adapter=True), Candidate(B, 4, has_adapter=True), Candidate(A, 0)], B),
        # No replica holds it: its home, of those with a free slot.
        ([Candidate(C, 0), Candidate(B, 0), Candidate(A, 0)], A),
        ([Candidate(C, 0, free_slots=1), Candidate(B, 0, free_slots=2), Candidate(A, 0)], B),
        # The others have a mean of 2: one and a half times that and 12 more are 15.
        ([Candidate(C, 14, has_adapter=True, free_slots=1), *(Candidate(name, 2, free_slots=1) for name in (A, B))], C),
        ([Candidate(C, 15, has_adapter=True, free_slots=1), *(Candidate(name, 2, free_slots=1) for name in (A, B))], A),
        # Where the copy would evict another adapter, the slack is twice 12.
        ([Candidate(C, 26, has_adapter=True), Candidate(A, 2), Candidate(B, 2)], C),
        ([Candidate(C, 27, has_adapter=True), Candidate(A, 2), Candidate(B, 2)], A),
        # A free slot of an overloaded replica does not count.
        ([Candidate(C, 29, has_adapter=True), Candidate(A, 40, free_slots=1), Candidate(B, 2)], C),
        # An overloaded home is passed over.
        ([Candidate(A, 30, free_slots=1), Candidate(B, 0, free_slots=1), Candidate(C, 0, free_slots=1)], B),
    ],
)
def test_the_best_replica(seen, expected):
    assert route("v", seen)[0] == expected


def test_the_base_goes_to_the_least_loaded():
    seen = [Candidate("a", 3), Candidate("b", 1), Candidate("d", 2)]
    assert route(None, seen) == ("b", "d", "a")


def test_without_replicas_there_is_no_route():
    assert route("v", []) == route(None, []) == ()


@given(versions, candidates)
def test_each_replica_is_named_once(version, seen):
    order = route(version, seen)
    assert sorted(order) == sorted(c.replica for c in seen)
    assert order == route(version, list(reversed(seen)))


@given(versions, candidates)
def test_the_best_is_not_overloaded(version, seen):
    live = {c.replica: c.load for c in seen}
    if len(live) > 1:
        load = live[route(version, seen)[0]]
        assert load < LOAD_FACTOR * (sum(live.values()) - load) / (len(live) - 1) + 2 * SLACK_REQUESTS


@given(st.sampled_from(["v1", "v2", "v3"]), candidates, st.integers(0, 7))
def test_a_replica_that_ends_moves_only_its_own_adapters(version, seen, gone):
    alike = [Candidate(c.replica, 3, c.has_adapter, c.free_slots) for c in seen]
    rest = [c for c in alike if c.replica != f"replica-{gone}"]
    before = [name for name in route(version, alike) if name != f"replica-{gone}"]
    assert list(route(version, rest)) == before


def test_homes_are_spread():
    counts = [sum(homes(f"v{number}")[0] == name for number in range(1000)) for name in NAMES]
    assert min(counts) > 150


def test_dispatches_count_until_reports_include_them():
    recent, report = RecentDispatches(lag_seconds=1.0), ReplicaReport("a", frozenset({"v1"}), free_slots=2, requests=3)
    recent.record("r1", "a", "v2", now=0.0)
    recent.record("r2", "a", "v1", now=0.5)
    recent.record("r3", "a", None, now=0.5)
    recent.record("r4", "b", "v3", now=0.5)
    assert recent.candidates([report], "v2", now=0.9) == [Candidate("a", 6, True, 1)]
    assert recent.candidates([report], "v3", now=0.9) == [Candidate("a", 6, False, 1)]
    assert recent.candidates([report], None, now=0.9) == [Candidate("a", 6, False, 1)]
    assert recent.candidates([report], "v2", now=1.2) == [Candidate("a", 5, False, 2)]
    assert recent.candidates([report], "v1", now=1.7) == [Candidate("a", 3, True, 2)]


def test_a_request_that_is_dispatched_again_counts_once():
    recent = RecentDispatches(lag_seconds=1.0)
    recent.record("r1", "a", "v1", now=0.0)
    recent.record("r1", "b", "v1", now=0.1)
    assert recent.candidates([ReplicaReport("a"), ReplicaReport("b")], "v1", now=0.2) == [
        Candidate("a", 0),
        Candidate("b", 1, True, -1),
    ]


def test_a_report_is_read_back():
    stats = report_stats(("v2", "v1", "v2"), slots=4, requests=7)
    assert ReplicaReport.from_stats("a", stats) == ReplicaReport("a", frozenset({"v1", "v2"}), free_slots=2, requests=7)
    assert stats == report_stats(("v1", "v2"), slots=4, requests=7)
    assert ReplicaReport.from_stats("a", {}) == ReplicaReport("a")


@pytest.mark.parametrize(
    ("replicas", "slots", "adapters", "count"),
    [(3, 8, 24, 400), (4, 16, 64, 600), (2, 16, 64, 600), (4, 8, 128, 600), (3, 8, 64, 600)],
)
def test_few_loads_and_balanced_replicas_under_zipfs_law(replicas, slots, adapters, count):
    loads = least = minimum = 0
    for seed in range(4):
        arrivals = zipf(seed, replicas, adapters, count)
        requested = [arrival.version for arrival in arrivals if arrival.version]
        seen = play([f"{seed}-{number}" for number in range(replicas)], slots, arrivals, seed=seed)
        loads += seen.loads.total()
        least += informed(requested, replicas * slots)
        minimum += clairvoyant(requested, replicas * slots)
        assert seen.imbalance < 2.5
    assert loads <= 1.6 * least
    # Where all adapters fit, knowing the future doesn't help: each is loaded once.
    assert minimum <= least
    assert loads <= (1.6 if adapters <= replicas * slots else 2.0) * minimum


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("replicas", "others"), [(2, 4), (3, 4), (3, 16)])
def test_a_hot_adapter_spreads_in_five_seconds_and_others_stay(replicas, others, seed):
    names = [f"{seed}-{number}" for number in range(replicas)]
    quiet = [Arrival(at / 4, f"v{at % others}") for at in range(120)]
    # From then on one adapter has more requests than a replica can serve.
    hot = [Arrival(at, "hot") for at in accumulate([10.0, *[1 / 16] * 320])]
    seen = play(names, 8, sorted((*quiet, *hot), key=lambda arrival: arrival.at), seed=seed)
    assert len({to for at, version, to in seen.sent if version == "hot" and at < 15}) >= 2
    alone = play(names, 8, quiet, seed=seed)
    # A hot adapter may evict a cold one once, but not repeatedly.
    assert seen.loads.total() - seen.loads["hot"] <= 2 * alone.loads.total()


def test_a_cold_adapter_stays_where_it_is():
    seen = play("abc", 8, [Arrival(at / 2, "v") for at in range(40)])
    assert seen.loads == {"v": 1}


@pytest.mark.parametrize("seed", range(4))
def test_only_the_adapters_of_a_dead_replica_move(seed):
    names = [f"{seed}-{number}" for number in range(3)]
    arrivals = [Arrival(number / 4, f"v{number % 12}") for number in range(160)]
    seen = play(names, 16, arrivals, dies=(names[0], 20.0), seed=seed)
    before = {f"v{number}": play(names, 16, arrivals[:80], seed=seed).replicas_of(f"v{number}") for number in range(12)}
    after = {version: seen.replicas_of(version, since=20.0) for version in before}
    assert all(len(where) == 1 for where in (*before.values(), *after.values()))
    assert any(where == {names[0]} for where in before.values())
    assert all(names[0] not in where for where in after.values())
    assert all(after[version] == where for version, where in before.items() if names[0] not in where)
