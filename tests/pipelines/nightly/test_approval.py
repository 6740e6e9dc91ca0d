"""`gate.approval: manual`: a run asks once, continues and ends; the next one asks again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from loramill.pipelines.nightly import promote
from loramill.pipelines.nightly.outcome import Verdict, outcomes, summary
from loramill.registry import adapters, nightly, nightly_approvals
from loramill.types import Approval

from .cluster import Cluster, only, rows


@pytest.fixture
def asking(cluster: Cluster) -> Cluster:
    """A cluster with two adapters, of which acme's needs a person to replace its first version."""
    override = "overrides: [{adapters: acme/*, gate: {approval: manual}, watch: {window: 10m}}]\n"
    cluster.settings.nightly_file.write_text(override)
    earlier: list[str] = []
    cluster.right = lambda model: "@" in model and not any(each[:12] in model for each in earlier)
    for name in ("acme/a", "bolt/b"):
        cluster.feed(name, rows(60, "first"))
    found = cluster.run()
    assert [each.verdict for each in found] == [Verdict.PROMOTED] * 2, "a first version answers at once"
    earlier += [str(cluster.champion(name)) for name in ("acme/a", "bolt/b")]
    return cluster


def waiting(cluster: Cluster) -> list[Approval]:
    with cluster.registry.reading() as session:
        return nightly_approvals.list_waiting(session)


def last_run(cluster: Cluster) -> Any:
    with cluster.registry.reading() as session:
        return nightly.list_runs(session)[0]


def decide(cluster: Cluster, pending: Approval, *, approve: bool) -> Mapping[str, str]:
    with cluster.registry.writing() as session:
        answer = nightly_approvals.approve if approve else nightly_approvals.reject
        answer(session, pending.run, pending.adapter, by="key-1", note="I read its answers")
        found = {each.adapter: each for each in outcomes(nightly.list_steps(session, pending.run))}
    return {"verdict": str(found[pending.adapter].verdict), "reason": found[pending.adapter].reason}


def test_a_run_asks_and_ends_and_a_person_promotes(asking: Cluster) -> None:
    first = asking.champion("acme/a")
    for name in ("acme/a", "bolt/b"):
        asking.feed(name, rows(60, "second"))
    acme, bolt = asking.run()
    assert (acme.verdict, bolt.verdict) == (Verdict.AWAITING, Verdict.PROMOTED)
    assert acme.reason.endswith("; it waits for approval")
    assert summary([acme, bolt]) == "Nightly run: 1 promoted, 1 awaiting approval."
    assert last_run(asking).finished_at is not None
    (pending,) = waiting(asking)
    assert (pending.adapter, pending.champion) == ("acme/a", first) and asking.champion("acme/a") == first
    assert pending.introduction.policy.window_seconds == 600
    with asking.registry.reading() as session:
        assert adapters.get(session, "acme/a").challenger == pending.version, "it can be tried as @challenger"
    found = decide(asking, pending, approve=True)
    assert found["verdict"] == "promoted" and found["reason"].endswith("approved by key-1: I read its answers")
    assert asking.champion("acme/a") == pending.version


def test_a_challenger_that_is_rejected_is_reported_as_rejected(asking: Cluster) -> None:
    asking.feed("acme/a", rows(60, "second"))
    asking.run()
    found = decide(asking, waiting(asking)[0], approve=False)
    assert found["verdict"] == "rejected" and found["reason"].endswith("rejected by key-1: I read its answers")


def test_a_run_that_was_killed_after_its_question_does_not_ask_again(
    asking: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    asking.feed("acme/a", rows(60, "second"))
    with monkeypatch.context() as patched:
        patched.setattr(nightly, "finish_run", killed)
        with pytest.raises(KeyboardInterrupt):
            asking.run()
    (pending,) = waiting(asking)
    assert only(asking.run()).verdict is Verdict.AWAITING and waiting(asking) == [pending]


def test_a_run_that_is_resumed_after_the_answer_does_not_ask_again(
    asking: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    asking.feed("acme/a", rows(60, "second"))
    with monkeypatch.context() as patched:
        patched.setattr(nightly, "finish_run", killed)
        with pytest.raises(KeyboardInterrupt):
            asking.run()
    (pending,) = waiting(asking)
    decide(asking, pending, approve=True)
    assert only(asking.run()).verdict is Verdict.PROMOTED and waiting(asking) == []
    assert asking.champion("acme/a") == pending.version


def test_a_kill_while_it_asks_leaves_no_question(asking: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    asking.feed("acme/a", rows(60, "second"))
    with monkeypatch.context() as patched:
        patched.setattr(promote.NightlyContext, "finish", killed)
        with pytest.raises(KeyboardInterrupt):
            asking.run()
    assert waiting(asking) == []
    assert only(asking.run()).verdict is Verdict.AWAITING and len(waiting(asking)) == 1


def test_the_next_challenger_takes_the_place_of_one_that_waits(asking: Cluster) -> None:
    asking.feed("acme/a", rows(60, "second"))
    asking.run()
    (older,) = waiting(asking)
    asking.feed("acme/a", rows(60, "third"))
    assert only(asking.run()).verdict is Verdict.AWAITING
    (pending,) = waiting(asking)
    assert pending.version != older.version and pending.champion == older.champion
    (before,) = asking.outcomes(older.run)
    assert before.verdict is Verdict.HELD and f"the challenger of {pending.run} passed the gate" in before.reason


def test_a_challenger_that_fails_the_gate_leaves_the_one_that_waits(asking: Cluster) -> None:
    asking.feed("acme/a", rows(60, "second"))
    asking.run()
    (older,) = waiting(asking)
    asking.right = lambda model: False
    asking.feed("acme/a", rows(60, "third"))
    assert only(asking.run()).verdict in (Verdict.HELD, Verdict.REJECTED)
    assert waiting(asking) == [older]
    assert decide(asking, older, approve=True)["verdict"] == "promoted"


def test_a_challenger_that_is_promoted_ends_the_wait_of_an_older_one(asking: Cluster) -> None:
    asking.feed("acme/a", rows(60, "second"))
    asking.run()
    asking.settings.nightly_file.write_text("gate: {approval: automatic}\n")
    asking.feed("acme/a", rows(60, "third"))
    assert only(asking.run()).verdict is Verdict.PROMOTED
    assert waiting(asking) == []


def test_a_pinned_champion_is_held_without_a_question(asking: Cluster) -> None:
    with asking.registry.writing() as session:
        champion = str(adapters.get(session, "acme/a").champion)
        adapters.pin(session, "acme/a", champion, "stay")
    asking.feed("acme/a", rows(60, "second"))
    outcome = only(asking.run())
    assert outcome.verdict is Verdict.HELD and "pinned" in outcome.reason and waiting(asking) == []
