"""New data in nightly runs: how much is enough, and what is known, bad, or used again."""

from __future__ import annotations

import json
import time

import pytest

from loramill.pipelines.nightly.collection.counts import CollectedCounts
from loramill.pipelines.nightly.outcome import Verdict, succeeded
from loramill.registry import (
    datasets,
    nightly,
    nightly_again,
)

from .cluster import Cluster, only, rows


@pytest.mark.parametrize(("valid", "enough"), [(0, 11), (5, 10)])
def test_little_data_waits_until_there_is_enough(cluster: Cluster, valid: int, enough: int) -> None:
    cluster.feed("acme/a", rows(1), rows(valid, "valid"))
    for _ in range(2):
        waiting = only(cluster.run())
        assert waiting.verdict is Verdict.WAITING and succeeded([waiting]) and cluster.pending() == ["acme/a"]
        assert f"at least {enough}" in waiting.reason and f"add {enough - 1} more" in waiting.reason
    with cluster.registry.reading() as session:
        state = nightly.new_data_state(session, "acme/a", 10)
    assert (state.examples, state.validation_examples, state.enough) == (1, valid, False)
    assert state.outlook == waiting.reason
    cluster.feed("acme/a", rows(enough - 1, "more"))
    first = only(cluster.run())
    if valid:
        assert first.verdict is Verdict.PROMOTED
    else:
        assert first.verdict is Verdict.HELD and "at least 5 held-out examples are needed" in first.reason
    cluster.feed("acme/a", rows(2, "late"))  # with old data, two are enough: one to train on, one to evaluate on
    if valid:
        with cluster.registry.reading() as session:
            assert " and 3 older ones" in nightly.new_data_state(session, "acme/a", 4, replay=3).outlook
    assert only(cluster.run()).verdict in (Verdict.PROMOTED, Verdict.HELD)


def test_examples_that_are_all_the_same_wait_for_others(cluster: Cluster) -> None:
    cluster.feed("acme/a", rows(1) * 20)
    waiting = only(cluster.run())
    assert waiting.verdict is Verdict.WAITING and waiting.reason.startswith("1 new example so far")
    question = "Where is the parcel that I ordered three weeks ago and that has still not arrived at my house"
    alike = [{"role": "user", "content": question}, {"role": "assistant", "content": "On its way."}]
    same = [{"messages": [{"role": "user", "content": f"{question}{'?' * count}"}, alike[1]]} for count in range(11)]
    cluster.feed("bolt/b", same)
    _, waiting = cluster.run()
    assert waiting.verdict is Verdict.WAITING and "all alike" in waiting.reason


def test_data_that_is_known_is_skipped(cluster: Cluster) -> None:
    cluster.feed("acme/a", rows(12))
    assert only(cluster.run()).counts == CollectedCounts(train=11, held_out=1)
    cluster.feed("acme/a", rows(12))
    skipped = only(cluster.run())
    assert (skipped.verdict, skipped.reason) == (
        Verdict.SKIPPED,
        "nothing new: 11 known already, 1 equal or similar to held-out examples.",
    )
    assert succeeded([skipped]) and cluster.pending() == [] and cluster.run() == []
    assert cluster.trained == ["acme/a"]


def test_bad_rows_are_quarantined_and_listed(cluster: Cluster) -> None:
    bad = [{"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": ""}]}]
    cluster.feed("acme/a", [*rows(12), *bad])
    outcome = only(cluster.run())
    assert (outcome.stage, outcome.counts.quarantined) == ("promote", 1)
    assert outcome.quarantined == (
        "rows.jsonl, line 13: messages[1].content is empty; write the text, or remove the example.",
    )
    with cluster.registry.reading() as session:
        file = datasets.get(session, outcome.quarantine or "", "acme")
    (found,) = cluster.registry.artifacts.read(file.artifact, "data.jsonl").splitlines()
    assert json.loads(found) == {
        "file": "rows.jsonl",
        "line": 13,
        "field": "messages[1].content",
        "reason": "messages[1].content is empty; write the text, or remove the example.",
        "row": json.dumps(bad[0]),
    }


def test_data_since_a_time_is_used_again(cluster: Cluster) -> None:
    cluster.feed("acme/a", rows(60))
    cluster.run()
    between = time.time()
    cluster.feed("acme/b", rows(60))
    cluster.run()
    assert cluster.trained == ["acme/a", "acme/b"] and cluster.run() == []
    with cluster.registry.writing() as session:
        (found,) = nightly_again.backfill(session, between)
        assert found.adapter == "acme/b"
    assert only(cluster.run()).adapter == "acme/b" and cluster.trained == ["acme/a", "acme/b", "acme/b"]
