"""`split.by`: the rows of a user are on one side, in all runs and with everything that joins the training data."""

from __future__ import annotations

import json
from typing import Any

from loramill.pipelines.nightly.collection.past import read_rows
from loramill.pipelines.nightly.outcome import Verdict, succeeded
from loramill.registry import jobs, nightly

from .cluster import Cluster, only


def rows_of(word: str, users: range, count: int = 5) -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "user", "content": f"{word} {user} {number}"},
                {"role": "assistant", "content": f"answer {word} {user} {number}"},
            ],
            "metadata": {"user": f"user-{user}"},
        }
        for user in users
        for number in range(count)
    ]


def datasets_of(cluster: Cluster) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows that the last run trained on, and those of its slices `new` and `before`."""
    with cluster.registry.reading() as session:
        steps = nightly.list_steps(session, nightly.list_runs(session)[0].id)
        slices = next(step.result["slices"] for step in steps if step.step == "collect")
        job = jobs.list_jobs(session, tenant=None)[0]
        files = [job.spec.train, slices["new"], slices.get("before")]
        found = [read_rows(session, cluster.registry.artifacts, file) if file else [] for file in files]
    train, new, before = ([json.loads(row) for row in rows] for rows in found)
    return train, new, before


def users_of(rows: list[dict[str, Any]]) -> set[str]:
    return {row["metadata"]["user"] for row in rows}


def prompts(rows: list[dict[str, Any]]) -> set[str]:
    return {row["messages"][0]["content"] for row in rows}


def test_the_rows_of_a_user_are_on_one_side_over_all_runs(cluster: Cluster) -> None:
    file = cluster.settings.nightly_file
    cluster.feed("acme/a", rows_of("first", range(30)))
    assert only(cluster.run()).verdict is Verdict.PROMOTED
    _, by_content, _ = datasets_of(cluster)
    assert len(by_content) == 15 and len(users_of(by_content)) > 5, "the content decides, whoever the user is"

    file.write_text("split: {by: user, held_out: 0.2}\nreplay: {on_policy: 0.5}\n")
    held: set[str] = set()
    for number, word in enumerate(("second", "third", "fourth")):
        cluster.feed("acme/a", rows_of(word, range(10 * number, 30 + 10 * number)))
        assert succeeded(found := cluster.run()) and only(found).counts.train > 100
        train, new, before = datasets_of(cluster)
        held |= users_of(new)
        assert 3 <= len(users_of(new)) <= 12 and len(new) == 5 * len(users_of(new))
        assert not users_of(train) & held, "neither new nor replayed examples, nor on-policy ones"
        assert sum("first" in each for each in prompts(train)) > 20, "old examples are replayed"
        assert not prompts(train) & (prompts(by_content) | prompts(new) | prompts(before))
        assert users_of(rows_of(word, range(10 * number, 30 + 10 * number))) - users_of(train) == users_of(new)
        file.write_text("split: {by: user, held_out: 0.1}\nreplay: {on_policy: 0.5}\n")


def test_data_of_one_user_waits_until_others_have_some(cluster: Cluster) -> None:
    cluster.settings.nightly_file.write_text("split: {by: user}\n")
    cluster.feed("acme/a", rows_of("alone", range(1), 20))
    waiting = only(cluster.run())
    assert (waiting.verdict, waiting.reason) == (
        Verdict.WAITING,
        "20 new examples, and none to hold out. Add examples, with other values of user.",
    )
    cluster.feed("acme/a", rows_of("other", range(1, 3), 20))
    assert only(cluster.run()).verdict is Verdict.PROMOTED
    train, new, _ = datasets_of(cluster)
    assert len(users_of(new)) == 1 and len(users_of(train)) == 2
    (user,) = (int(each.removeprefix("user-")) for each in users_of(new))
    cluster.feed("acme/a", rows_of("again", range(user, user + 1), 20))
    waiting = only(cluster.run())
    assert (waiting.verdict, waiting.reason) == (
        Verdict.WAITING,
        "20 new examples, and none to train on. Add examples, with other values of user.",
    )


def test_too_few_rows_that_are_not_held_out_wait(cluster: Cluster) -> None:
    cluster.settings.nightly_file.write_text("split: {by: user}\n")
    cluster.feed("acme/a", rows_of("many", range(1), 20), rows_of("valid", range(1), 2))
    cluster.feed("acme/a", rows_of("few", range(1, 2), 3))
    waiting = only(cluster.run())
    assert waiting.verdict is Verdict.WAITING
    assert waiting.reason == (
        "23 new examples, 3 of them to train on; at least 10 are needed. Add examples, with other values of user."
    )
