"""Nightly runs: new data, runs and their steps."""

import pytest

from loramill.errors import NotFound
from loramill.names import AdapterName
from loramill.registry import adapters, datasets, nightly, tenants
from loramill.types import NewData, StepStatus

SUPPORT, SALES = AdapterName("acme", "support"), AdapterName("acme", "sales")


@pytest.fixture
def files(registry):
    with registry.writing() as session:
        tenants.create(session, "acme")
        tenants.create(session, "globex")
        return [datasets.create(session, "acme", f"{i}.jsonl", "a" * 64, 1, 1).id for i in range(4)]


def test_data_waits_until_it_is_collected(registry, files):
    with registry.writing() as session:
        nightly.add_data(session, SUPPORT, files[1], files[2])
        nightly.add_data(session, SALES, files[3], None)
        nightly.add_data(session, SUPPORT, files[0], None)
        support = NewData(adapter="acme/support", train=(files[1], files[0]), valid=(files[2],))
        sales = NewData(adapter="acme/sales", train=(files[3],), valid=())
        assert nightly.pending_data(session) == [sales, support]
        assert adapters.get(session, SUPPORT).champion is None
        run = nightly.open_run(session).id
        assert nightly.collect(session, run, SUPPORT) == support
        assert nightly.collect(session, run, SUPPORT) == support
        assert nightly.pending_data(session) == [sales]
        nightly.finish_run(session, run)
        following = nightly.open_run(session).id
        assert nightly.collect(session, following, SUPPORT) is None


def test_data_must_belong_to_the_adapters_tenant(registry, files):
    with registry.writing() as session:
        with pytest.raises(NotFound):
            nightly.add_data(session, AdapterName("globex", "bot"), files[0], None)
        with pytest.raises(NotFound):
            nightly.add_data(session, AdapterName("nobody", "bot"), files[0], None)
        assert nightly.pending_data(session) == []


def test_an_unfinished_run_is_resumed(registry):
    with registry.writing() as session:
        run = nightly.open_run(session)
    with registry.writing() as session:
        assert nightly.open_run(session) == run
        finished = nightly.finish_run(session, run.id)
        assert finished.finished_at is not None and nightly.finish_run(session, run.id) == finished
        following = nightly.open_run(session)
        assert following.id != run.id
        assert nightly.list_runs(session) == [following, finished]
        with pytest.raises(NotFound):
            nightly.finish_run(session, "night-0")


def test_steps_have_a_status(registry, files):
    with registry.writing() as session:
        nightly.add_data(session, SUPPORT, files[0], None)
        run = nightly.open_run(session).id
        pending = nightly.record_step(session, run, SUPPORT, "train", StepStatus.PENDING, {"job": "ftjob-1"})
        assert pending.finished_at is None
        other = nightly.record_step(session, run, SUPPORT, "evaluate", StepStatus.FAILED, {})
    with registry.writing() as session:
        done = nightly.record_step(session, run, "acme/support", "train", StepStatus.DONE, {"version": "a" * 64})
        assert done.finished_at is not None
    with registry.reading() as session:
        assert nightly.list_steps(session, run) == [done, other]
        assert nightly.list_steps(session, "night-0") == []
