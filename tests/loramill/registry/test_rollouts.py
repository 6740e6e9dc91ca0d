"""Rollouts in the registry: they end when an alias moves, and are decided once."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from loramill.errors import Conflict, InvalidRequest, NotFound
from loramill.names import AdapterName
from loramill.pipelines.nightly.rollouts.advance import advance
from loramill.registry import Registry, adapters, audit, deletion, renaming, tenants
from loramill.registry.rollouts import moves, records, traffic
from loramill.registry.rollouts.traffic import TrafficKey
from loramill.types import Alias, RolloutKind, RolloutOutcome, TrafficCounts, VersionRecord, WatchPolicy

NAME = AdapterName("acme", "support")
FIRST, SECOND, THIRD = ("1" * 64, "2" * 64, "3" * 64)
POLICY = WatchPolicy(window_seconds=600)
START = 6_000.0
DAY = 86_400.0


def publish(session: Any, version: str, name: AdapterName = NAME) -> None:
    record = VersionRecord(id=version, adapter=str(name), job=None, base="b" * 64, bytes=7, created_at=1.0)
    adapters.add_version(session, record)


@pytest.fixture
def session(registry: Registry) -> Iterator[Any]:
    with registry.writing() as session:
        tenants.create(session, "acme")
        adapters.get_or_create(session, NAME)
        publish(session, FIRST)
        publish(session, SECOND)
        yield session


def last(session: Any) -> tuple[RolloutKind, RolloutOutcome | None]:
    found = records.list_rollouts(session, name=NAME)[0]
    assert (records.find_open(session, NAME) is None) == (found.outcome is not None)
    return found.kind, found.outcome


def test_a_canary_tries_the_challenger_until_it_is_ended(session: Any) -> None:
    started = moves.start_canary(session, NAME, share=0.1, now=START)
    assert (started.version, started.baseline, started.share, started.ends_at) == (SECOND, FIRST, 0.1, None)
    changed = moves.start_canary(session, NAME, share=0.5, shadow=True)
    assert (changed.id, changed.share, changed.kind) == (started.id, 0.5, RolloutKind.SHADOW)
    assert moves.end_canary(session, NAME, "enough").outcome is RolloutOutcome.ENDED
    assert adapters.get(session, NAME).challenger == SECOND
    with pytest.raises(Conflict, match="has no canary"):
        moves.end_canary(session, NAME, "again")


def test_a_change_of_an_open_canary_keeps_what_it_does_not_set(session: Any) -> None:
    policy = WatchPolicy(window_seconds=600, min_requests=20, max_latency_ratio=3)
    moves.start_canary(session, NAME, share=0.1, policy=policy, promote_at_end=True, now=START)
    larger = moves.start_canary(session, NAME, share=0.5, now=START + 60)
    assert (larger.policy, larger.ends_at) == (policy, START + 600)
    changes = {"min_requests": 30}
    later = moves.start_canary(session, NAME, share=0.5, changes=changes, now=START + 60)
    assert (later.policy, later.ends_at) == (policy.model_copy(update=changes), START + 600)
    changes = {"window_seconds": 60}
    sooner = moves.start_canary(session, NAME, share=0.5, changes=changes, promote_at_end=True, now=START + 60)
    assert (sooner.policy.min_requests, sooner.policy.max_latency_ratio, sooner.ends_at) == (30, 3, START + 120)
    other = "4" * 64
    publish(session, other)
    started = moves.start_canary(session, NAME, share=0.5, version=other, changes={"min_requests": 7})
    assert (started.policy, started.ends_at) == (WatchPolicy(min_requests=7), None), "another version's own policy"


def test_a_canary_needs_a_challenger_and_a_champion_that_may_change(session: Any) -> None:
    with pytest.raises(InvalidRequest, match="between 0 and 1"):
        moves.start_canary(session, NAME, share=1.5)
    with pytest.raises(NotFound):
        moves.start_canary(session, NAME, share=0.1, version=THIRD)
    with pytest.raises(Conflict, match="already the champion"):
        moves.start_canary(session, NAME, share=0.1, version=FIRST)
    adapters.move(session, NAME, Alias.CHALLENGER, None, "no")
    with pytest.raises(Conflict, match="no challenger"):
        moves.start_canary(session, NAME, share=0.1)
    assert moves.start_canary(session, NAME, share=0.1, version=SECOND).version == SECOND
    adapters.pin(session, NAME, FIRST, "stay")
    assert last(session) == (RolloutKind.CANARY, RolloutOutcome.ENDED)
    with pytest.raises(Conflict, match="pinned"):
        moves.start_canary(session, NAME, share=0.1)


@pytest.mark.parametrize(
    ("how", "outcome"),
    [
        ("promote", RolloutOutcome.PROMOTED),
        ("promote another", RolloutOutcome.ENDED),
        ("new challenger", RolloutOutcome.ENDED),
        ("another canary", None),
        ("delete", RolloutOutcome.ENDED),
        ("drop", RolloutOutcome.ENDED),
        ("pin", RolloutOutcome.ENDED),
        ("unpin", None),
    ],
)
def test_a_canary_ends_with_what_it_compares(session: Any, how: str, outcome: RolloutOutcome | None) -> None:
    moves.start_canary(session, NAME, share=0.1)
    match how:
        case "promote":
            adapters.promote(session, NAME, SECOND, "test")
        case "promote another":
            publish(session, THIRD)
            moves.start_canary(session, NAME, share=0.1, version=SECOND)
            adapters.promote(session, NAME, THIRD, "test")
        case "new challenger":
            publish(session, THIRD)
        case "another canary":
            publish(session, THIRD)
            assert moves.start_canary(session, NAME, share=0.1).version == THIRD
        case "delete":
            deletion.delete_version(session, NAME, SECOND, force=True)
        case "drop":
            adapters.move(session, NAME, Alias.CHALLENGER, None, "test")
        case "pin":
            adapters.pin(session, NAME, FIRST, "test")
        case "unpin":
            adapters.unpin(session, NAME)
    assert last(session) == (RolloutKind.CANARY, outcome)


def test_a_rollback_by_hand_ends_a_canary_and_a_watch(session: Any) -> None:
    moves.promote_watched(session, NAME, SECOND, "better", policy=POLICY)
    assert last(session) == (RolloutKind.WATCH, None)
    adapters.rollback(session, NAME, "by hand")
    assert last(session) == (RolloutKind.WATCH, RolloutOutcome.ROLLED_BACK)
    publish(session, THIRD)
    moves.start_canary(session, NAME, share=0.1)
    adapters.rollback(session, NAME, "by hand")
    assert last(session) == (RolloutKind.CANARY, RolloutOutcome.ENDED)


def test_the_first_champion_and_a_window_of_zero_are_not_watched(session: Any) -> None:
    moves.promote_watched(session, NAME, FIRST, "again", policy=POLICY)
    moves.promote_watched(session, NAME, SECOND, "better", policy=WatchPolicy(window_seconds=0))
    assert records.list_rollouts(session, name=NAME) == []
    assert adapters.get(session, NAME).champion == SECOND


def test_rollouts_follow_a_rename_and_end_with_their_adapter(session: Any) -> None:
    started = moves.start_canary(session, NAME, share=0.1, now=START)
    traffic.write(session, "g1", {TrafficKey(str(NAME), SECOND, 6_000): TrafficCounts(requests=3)})
    to = AdapterName("acme", "help")
    renaming.rename(session, NAME, to)
    moved = records.find_open(session, to)
    assert moved == started.model_copy(update={"adapter": "acme/help"})
    assert moved is not None and traffic.measured(session, moved).tried.requests == 3
    deletion.delete_adapter(session, to)
    assert records.list_open(session) == []
    assert not traffic.has_before(session, 1e10)


def counts(requests: int = 1, **signals: Any) -> TrafficCounts:
    return TrafficCounts(requests=requests, **signals)


def test_traffic_is_the_sum_over_gateways_and_periods(session: Any) -> None:
    rollout = moves.start_canary(session, NAME, share=0.1, now=START + 30)
    name = str(NAME)
    traffic.write(
        session,
        "g1",
        {
            TrafficKey(name, SECOND, 5_400): counts(100),  # before the start
            TrafficKey(name, SECOND, 6_000): counts(2, cut=1, total_histogram={4: 1, 10: 1}),
            TrafficKey(name, FIRST, 6_600): counts(7, empty=2),
            TrafficKey(name, THIRD, 6_600): counts(9),
            TrafficKey("acme/other", FIRST, 6_600): counts(9),
        },
    )
    for _ in range(2):  # the second time after an unknown result
        written = {TrafficKey(name, SECOND, 6_000): counts(3, errors=1, total_histogram={10: 3})}
        traffic.write(session, "g2", written)
    traffic.add_rating(session, NAME, SECOND, good=True, now=6_010)
    traffic.add_rating(session, NAME, SECOND, good=False, now=6_020)
    traffic.add_rating(session, NAME, SECOND, good=False, now=6_690)
    traffic.add_rating(session, NAME, THIRD, good=False, now=6_690)
    state = traffic.measured(session, rollout)
    assert state.tried == counts(5, cut=1, errors=1, good=1, bad=2, total_histogram={4: 1, 10: 4})
    assert state.compared == counts(7, empty=2)
    assert traffic.measured_all(session, records.list_open(session)) == [state]


def test_a_watch_compares_with_the_day_before_it(session: Any) -> None:
    name = str(NAME)
    moves.promote_watched(session, NAME, SECOND, "better", policy=POLICY, now=START + DAY)
    rollout = records.find_open(session, NAME)
    assert rollout is not None and rollout.ends_at == START + DAY + 600
    periods = {START - 600: 1, START: 10, START + DAY - 600: 100, START + DAY + 600: 1000}
    traffic.write(session, "g1", {TrafficKey(name, FIRST, int(at)): counts(n) for at, n in periods.items()})
    traffic.write(session, "g1", {TrafficKey(name, SECOND, int(at)): counts(n) for at, n in periods.items()})
    state = traffic.measured(session, rollout)
    assert (state.tried.requests, state.compared.requests) == (1000, 1110)


@pytest.mark.parametrize(("others", "slowdown"), [(100, 4.0), (9, 1.0)])
def test_a_watch_knows_how_much_slower_other_adapters_became(session: Any, others: int, slowdown: float) -> None:
    moves.promote_watched(session, NAME, SECOND, "better", policy=POLICY, now=START + DAY)
    day = int(START + DAY)
    quick, slow = {0: 1_000, 8: others}, {16: others, 40: 1_000}  # its own answers, and those of others
    written = {
        (str(NAME), FIRST, day - 600): {0: 1_000},
        (str(NAME), SECOND, day): {40: 1_000},
        (*traffic.EVERYONE, day - 600): quick,
        (*traffic.EVERYONE, day): slow,
    }
    traffic.write(session, "g1", {TrafficKey(*key): counts(9, total_histogram=each) for key, each in written.items()})
    (state,) = traffic.measured_all(session, records.list_open(session))
    assert state.slowdown == slowdown


def test_old_traffic_is_forgotten_unless_it_is_needed(session: Any) -> None:
    moves.start_canary(session, NAME, share=0.1, now=0.0)
    traffic.write(session, "g1", {TrafficKey(str(NAME), SECOND, period): counts() for period in (0, 600, 1_200)})
    assert not traffic.has_before(session, 1e9)
    moves.end_canary(session, NAME, "enough")
    assert traffic.forget(session, 1_200) == 2
    assert not traffic.has_before(session, 1_200) and traffic.has_before(session, 1_201)


@pytest.fixture
def decided(registry: Registry) -> Registry:
    """A registry with a canary that has to be decided at 6600."""
    with registry.writing() as session:
        tenants.create(session, "acme")
        adapters.get_or_create(session, NAME)
        publish(session, FIRST)
        publish(session, SECOND)
        moves.start_canary(session, NAME, share=0.1, policy=POLICY, promote_at_end=True, now=START)
    return registry


def write(registry: Registry, tried: TrafficCounts, compared: TrafficCounts, period: int = 6_000) -> None:
    with registry.writing() as session:
        written = {TrafficKey(str(NAME), SECOND, period): tried, TrafficKey(str(NAME), FIRST, period): compared}
        traffic.write(session, "g1", written)


def aliases(registry: Registry) -> tuple[str | None, str | None, str | None]:
    with registry.reading() as session:
        found = adapters.get(session, NAME)
    return found.champion, found.challenger, found.previous


def test_a_good_canary_is_promoted_watched_and_kept(decided: Registry) -> None:
    write(decided, counts(100), counts(1000))
    assert advance(decided, 6_599.0) == []
    (ended,) = advance(decided, 6_600.0)
    assert ended.outcome is RolloutOutcome.PROMOTED
    assert aliases(decided) == (SECOND, None, FIRST)
    with decided.reading() as session:
        watch = records.find_open(session, NAME)
    assert watch is not None and (watch.kind, watch.ends_at) == (RolloutKind.WATCH, 7_200.0)
    write(decided, counts(1000), counts(0), 6_600)
    assert advance(decided, 6_600.0) == []
    assert [each.outcome for each in advance(decided, 7_200.0)] == [RolloutOutcome.KEPT]
    assert aliases(decided) == (SECOND, None, FIRST)
    with decided.reading() as session:
        changes = [(each.action, each.key, each.tenant) for each in audit.list_changes(session, "acme")]
    assert sorted(changes) == [("adapter.keep", "rollout", "acme"), ("adapter.promote", "rollout", "acme")]


def test_a_bad_canary_is_dropped_before_its_end(decided: Registry) -> None:
    write(decided, counts(60, cut=60), counts(1000))
    (ended,) = advance(decided, 6_060.0)
    assert ended.outcome is RolloutOutcome.ROLLED_BACK
    assert "cut at their length limit rose from 0.0% to 100.0%" in ended.reason
    assert aliases(decided) == (FIRST, None, None)
    assert advance(decided, 6_061.0) == []


def test_a_bad_champion_is_rolled_back_within_its_window(decided: Registry) -> None:
    with decided.writing() as session:
        moves.promote_watched(session, NAME, SECOND, "better", policy=POLICY, now=START)
    write(decided, counts(60, errors=30), counts(1000))
    assert [each.outcome for each in advance(decided, 6_060.0)] == [RolloutOutcome.ROLLED_BACK]
    assert aliases(decided) == (FIRST, None, SECOND)
    assert advance(decided, 9_000.0) == []
    assert aliases(decided) == (FIRST, None, SECOND)


def test_a_new_champion_without_requests_is_watched_until_its_users_come(decided: Registry) -> None:
    with decided.writing() as session:
        moves.promote_watched(session, NAME, SECOND, "better", policy=POLICY, now=START)
    assert advance(decided, 6_600.0) == []
    morning = 6_600 + 8 * 3_600
    write(decided, counts(60, empty=60), counts(0), morning)
    (ended,) = advance(decided, morning + 60.0)
    assert (ended.outcome, aliases(decided)[0]) == (RolloutOutcome.ROLLED_BACK, FIRST)
    assert "empty answers are 100.0%" in ended.reason


def test_two_processes_decide_once(decided: Registry, database_url: str, tmp_path: Any) -> None:
    write(decided, counts(100), counts(1000))
    registries = [Registry.open(database_url, (tmp_path / "artifacts").as_uri()) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        ended = list(pool.map(lambda registry: advance(registry, 6_600.0), registries))
    assert sum(map(len, ended)) == 1
    with decided.reading() as session:
        assert sum(change.alias is Alias.CHAMPION for change in adapters.alias_history(session, NAME)) == 2
    for registry in registries:
        registry.close()


def test_a_kill_between_decision_and_move_is_repaired(decided: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    write(decided, counts(100), counts(1000))

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(adapters, "promote", killed)
        with pytest.raises(KeyboardInterrupt):
            advance(decided, 6_600.0)
    with decided.reading() as session:
        assert records.find_open(session, NAME) is not None
    assert aliases(decided) == (FIRST, SECOND, None)
    assert len(advance(decided, 6_600.0)) == 1
    assert aliases(decided) == (SECOND, None, FIRST)


class Rollouts(RuleBasedStateMachine):
    """An open rollout always compares what the aliases point to, whatever happens to the adapter."""

    registry: Registry

    @initialize()
    def begin(self) -> None:
        self.name = AdapterName(f"t{secrets.token_hex(6)}", "bot")
        with self.registry.writing() as session:
            tenants.create(session, self.name.tenant)
            adapters.get_or_create(session, self.name)
            publish(session, "a" * 64, self.name)

    @rule(content=st.sampled_from("abc"))
    def publish(self, content: str) -> None:
        with self.registry.writing() as session:
            publish(session, content * 64, self.name)

    @rule(content=st.sampled_from("abc"), action=st.sampled_from(["promote", "watch", "pin", "delete", "canary"]))
    def change(self, content: str, action: str) -> None:
        version = content * 64
        try:
            with self.registry.writing() as session:
                match action:
                    case "promote":
                        adapters.promote(session, self.name, version, "test")
                    case "watch":
                        moves.promote_watched(session, self.name, version, "test", policy=POLICY)
                    case "pin":
                        adapters.pin(session, self.name, version, "test")
                    case "delete":
                        deletion.delete_version(session, self.name, version, force=True)
                    case _:
                        moves.start_canary(session, self.name, share=0.5, version=version)
        except (Conflict, NotFound):
            pass

    @rule(action=st.sampled_from(["rollback", "unpin", "drop", "end"]), outcome=st.sampled_from(RolloutOutcome))
    def undo(self, action: str, outcome: RolloutOutcome) -> None:
        try:
            with self.registry.writing() as session:
                match action:
                    case "rollback":
                        adapters.rollback(session, self.name, "test")
                    case "unpin":
                        adapters.unpin(session, self.name)
                    case "drop":
                        adapters.move(session, self.name, Alias.CHALLENGER, None, "test")
                    case _:
                        found = records.find_open(session, self.name)
                        if found is not None and (outcome is RolloutOutcome.KEPT) == (found.kind is RolloutKind.WATCH):
                            moves.settle(session, found, outcome, "test", now=1.0)
        except Conflict:
            pass

    @invariant()
    def it_compares_what_the_aliases_point_to(self) -> None:
        with self.registry.reading() as session:
            found = records.find_open(session, self.name)
            adapter = adapters.get(session, self.name)
        if found is None:
            return
        assert not adapter.pinned
        if found.kind is RolloutKind.WATCH:
            assert (found.version, found.baseline) == (adapter.champion, adapter.previous)
        else:
            assert (found.version, found.baseline) == (adapter.challenger, adapter.champion)


def test_rollouts_agree_with_the_aliases(registry: Registry) -> None:
    machine = type("Rollouts", (Rollouts,), {"registry": registry})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=25, stateful_step_count=15, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
