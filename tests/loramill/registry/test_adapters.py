"""Adapters, versions, aliases."""

import secrets

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from loramill.errors import Conflict, ModelNotFound, NotFound
from loramill.names import AdapterName
from loramill.registry import adapters, deletion, evaluations, renaming, tenants
from loramill.types import Alias, VersionRecord

NAME = AdapterName("acme", "support")


def a_version(content: str, adapter: AdapterName = NAME) -> VersionRecord:
    return VersionRecord(
        id=content.ljust(64, "0"),
        adapter=str(adapter),
        job=None,
        base="b" * 64,
        bytes=7,
        created_at=float(len(content)),
    )


@pytest.fixture
def session(registry):
    with registry.writing() as session:
        tenants.create(session, "acme")
        adapters.get_or_create(session, NAME)
        yield session


def test_get_or_create_makes_an_adapter_once_and_only_for_a_tenant(session):
    assert adapters.get_or_create(session, NAME) == adapters.get(session, "acme/support")
    with pytest.raises(NotFound, match="globex"):
        adapters.get_or_create(session, AdapterName("globex", "support"))
    with pytest.raises(NotFound):
        adapters.get(session, "acme/sales")


def test_the_first_version_is_champion_and_later_ones_challenge(session):
    first, second = a_version("aaaaaaaa1"), a_version("aaaaaaaa22")
    assert adapters.add_version(session, first) is Alias.CHAMPION
    assert adapters.add_version(session, first) is None
    assert adapters.add_version(session, second) is Alias.CHALLENGER
    record = adapters.get(session, NAME)
    assert (record.champion, record.challenger, record.previous) == (first.id, second.id, None)
    assert adapters.list_versions(session, NAME) == [second, first]
    assert adapters.get_version(session, first.id) == first
    with pytest.raises(NotFound):
        adapters.get_version(session, "f" * 64)


def test_resolve(session):
    first, second = a_version("aaaaaaaa1"), a_version("aaaaaaaa22")
    with pytest.raises(ModelNotFound, match="no version yet"):
        adapters.resolve(session, NAME, "champion")
    with pytest.raises(ModelNotFound, match="there is no adapter 'acme/other'"):
        adapters.resolve(session, "acme/other", "champion")
    adapters.add_version(session, first)
    adapters.add_version(session, second)
    assert adapters.resolve(session, NAME, "champion") == first
    assert adapters.resolve(session, NAME, "challenger") == second
    assert adapters.resolve(session, NAME, "aaaaaaaa1") == first
    assert adapters.resolve(session, NAME, second.id) == second
    for selector, reason in {
        "aaaaaaaa": "several versions",
        "bbbbbbbb": "no version that begins with",
        "aaaaaaa": "at least 8 hex digits",
        "AAAAAAAA1": "at least 8 hex digits",
        "%%%%%%%%": "at least 8 hex digits",
        "winner": "champion, challenger, previous",
        "previous": "has no previous; its aliases are challenger, champion",
    }.items():
        with pytest.raises(ModelNotFound, match=reason) as error:
            adapters.resolve(session, NAME, selector)
        assert error.value.param == "model"


def test_promote_and_rollback(session):
    first, second = a_version("aaaaaaaa1"), a_version("aaaaaaaa22")
    adapters.add_version(session, first)
    with pytest.raises(Conflict, match="no previous"):
        adapters.rollback(session, NAME, "why not")
    adapters.add_version(session, second)
    promoted = adapters.promote(session, NAME, second.id, "better")
    assert (promoted.champion, promoted.challenger, promoted.previous) == (second.id, None, first.id)
    assert adapters.promote(session, NAME, second.id, "again") == promoted
    back = adapters.rollback(session, NAME, "worse after all")
    assert (back.champion, back.challenger, back.previous) == (first.id, None, second.id)
    moves = [(change.alias, change.version, change.reason) for change in adapters.alias_history(session, NAME)]
    assert moves == [
        (Alias.CHAMPION, first.id, "worse after all"),
        (Alias.PREVIOUS, second.id, "worse after all"),
        (Alias.CHALLENGER, None, "better"),
        (Alias.CHAMPION, second.id, "better"),
        (Alias.PREVIOUS, first.id, "better"),
        (Alias.CHALLENGER, second.id, "imported"),
        (Alias.CHAMPION, first.id, "imported"),
    ]


def test_a_version_of_another_adapter_is_refused(session):
    other = AdapterName("acme", "sales")
    adapters.get_or_create(session, other)
    adapters.add_version(session, a_version("aaaaaaaa1"))
    adapters.add_version(session, a_version("cccccccc", other))
    with pytest.raises(NotFound, match=r"acme/support.*has no version"):
        adapters.promote(session, NAME, a_version("cccccccc").id, "mixed up")
    with pytest.raises(NotFound):
        adapters.move(session, NAME, Alias.CHALLENGER, a_version("cccccccc").id, "mixed up")
    with pytest.raises(ModelNotFound):
        adapters.resolve(session, NAME, "cccccccc")


def test_two_adapters_may_have_the_same_content(session):
    other = AdapterName("acme", "sales")
    adapters.get_or_create(session, other)
    adapters.add_version(session, a_version("aaaaaaaa1"))
    adapters.add_version(session, a_version("aaaaaaaa1", other))
    assert adapters.resolve(session, other, "champion").adapter == "acme/sales"
    assert adapters.resolve(session, NAME, "champion").adapter == "acme/support"


def test_move_leaves_the_champion_alone(session):
    first, second = a_version("aaaaaaaa1"), a_version("aaaaaaaa22")
    adapters.add_version(session, first)
    adapters.add_version(session, second)
    record = adapters.move(session, NAME, Alias.CHALLENGER, None, "worse")
    assert (record.champion, record.challenger) == (first.id, None)
    with pytest.raises(Conflict):
        adapters.move(session, NAME, Alias.CHAMPION, second.id, "by the back door")
    with pytest.raises(Conflict):
        adapters.move(session, NAME, Alias.CHALLENGER, first.id, "against itself")


def test_adapters_are_listed_with_their_aliases(session):
    tenants.create(session, "globex")
    adapters.get_or_create(session, AdapterName("globex", "bot"))
    adapters.add_version(session, a_version("aaaaaaaa1"))
    assert [adapter.name for adapter in adapters.list_adapters(session, None)] == ["acme/support", "globex/bot"]
    assert adapters.list_adapters(session, "acme") == [adapters.get(session, NAME)]
    assert adapters.list_adapters(session, "globex")[0].champion is None


def test_evaluations(session):
    version = a_version("aaaaaaaa1")
    adapters.add_version(session, version)
    base = evaluations.add(session, NAME, None, "file-1", "all", 20, {"exact_match": 0.1})
    own = evaluations.add(session, NAME, version.id, "file-1", "all", 20, {"exact_match": 0.9, "loss": 0.5})
    assert evaluations.list_evaluations(session, NAME) == [own, base]
    assert own.metrics == {"exact_match": 0.9, "loss": 0.5} and own.results is None
    with pytest.raises(NotFound):
        evaluations.add(session, "acme/sales", None, "file-1", "all", 20, {})


class Aliases(RuleBasedStateMachine):
    """The registry agrees with three variables after any publish, promotion, rollback, deletion and rename."""

    registry = None

    @initialize()
    def begin(self):
        self.name = AdapterName(f"t{secrets.token_hex(6)}", "bot")
        self.versions, self.champion, self.challenger, self.previous = [], None, None, None
        with self.registry.writing() as session:
            tenants.create(session, self.name.tenant)
            adapters.get_or_create(session, self.name)

    @rule(content=st.sampled_from("abcdef"))
    def publish(self, content):
        version = a_version(content * 8, self.name)
        with self.registry.writing() as session:
            adapters.add_version(session, version)
        self.versions.append(version.id)
        if self.champion is None:
            self.champion = version.id
        elif self.champion != version.id:
            self.challenger = version.id

    @precondition(lambda self: self.versions)
    @rule(data=st.data())
    def promote(self, data):
        version = data.draw(st.sampled_from(self.versions))
        with self.registry.writing() as session:
            adapters.promote(session, self.name, version, "test")
        if version != self.champion:
            self.previous, self.champion = self.champion, version
        self.challenger = None if self.challenger == version else self.challenger

    @rule()
    def rollback(self):
        try:
            with self.registry.writing() as session:
                adapters.rollback(session, self.name, "test")
        except Conflict:
            assert self.previous is None
            return
        self.previous, self.champion = self.champion, self.previous
        self.challenger = None if self.challenger == self.champion else self.challenger

    @precondition(lambda self: self.versions)
    @rule(data=st.data(), force=st.booleans())
    def delete_version(self, data, force):
        version = data.draw(st.sampled_from(self.versions))
        pointed = version in (self.challenger, self.previous)
        try:
            with self.registry.writing() as session:
                deletion.delete_version(session, self.name, version, force=force)
        except Conflict:
            assert version == self.champion or (pointed and not force)
            return
        assert version != self.champion and (force or not pointed)
        self.versions = [each for each in self.versions if each != version]
        self.challenger = None if self.challenger == version else self.challenger
        self.previous = None if self.previous == version else self.previous

    @rule()
    def delete_adapter(self):
        old = set(self.versions)
        with self.registry.writing() as session:
            assert deletion.delete_adapter(session, self.name).versions == len(old)
        with self.registry.writing() as session:
            for model in ("champion", *old):
                with pytest.raises(ModelNotFound):
                    adapters.resolve(session, self.name, model)
            adapters.get_or_create(session, self.name)
        self.versions, self.champion, self.challenger, self.previous = [], None, None, None

    @rule(number=st.integers(0, 3))
    def rename(self, number):
        to = AdapterName(self.name.tenant, f"bot{number}")
        with self.registry.writing() as session:
            renaming.rename(session, self.name, to)
        if to != self.name:
            with self.registry.reading() as session, pytest.raises(NotFound):
                adapters.get(session, self.name)
        self.name = to

    @rule()
    def clear_challenger(self):
        with self.registry.writing() as session:
            adapters.move(session, self.name, Alias.CHALLENGER, None, "test")
        self.challenger = None

    @invariant()
    def registry_agrees(self):
        with self.registry.reading() as session:
            record = adapters.get(session, self.name)
            history = adapters.alias_history(session, self.name)
            versions = {version.id for version in adapters.list_versions(session, self.name)}
        aliases = {alias: getattr(record, alias) for alias in Alias}
        assert aliases == {"champion": self.champion, "challenger": self.challenger, "previous": self.previous}
        assert aliases == {
            alias: next((move.version for move in history if move.alias is alias), None) for alias in Alias
        }
        assert versions == set(self.versions)
        assert bool(self.versions) == (record.champion is not None)
        assert record.champion is None or record.champion not in (record.previous, record.challenger)


def test_aliases_always_agree_with_their_history(registry):
    machine = type("Bound", (Aliases,), {"registry": registry})
    quick = settings(
        max_examples=15,
        stateful_step_count=15,
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    run_state_machine_as_test(machine, settings=quick)
