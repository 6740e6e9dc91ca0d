"""Runs that train on preferences, alone or after examples, on a real registry."""

from __future__ import annotations

import json
from typing import Any

import pytest

from loramill.errors import TrainingDiverged
from loramill.pipelines.nightly.collection.past import read_rows
from loramill.pipelines.nightly.outcome import Verdict
from loramill.registry import adapters, content, jobs, nightly
from loramill.types import ContentSide, JobRecord, JobStatus

from ..cluster import Cluster, only, rows
from .test_starts import result, trained_jobs


def pairs(count: int, word: str = "rated") -> list[dict[str, Any]]:
    return [
        {
            "input": {"messages": [{"role": "user", "content": f"{word} {number}"}]},
            "preferred_output": [{"role": "assistant", "content": f"answer {word} {number}"}],
            "non_preferred_output": [{"role": "assistant", "content": f"wrong {word} {number}"}],
        }
        for number in range(count)
    ]


def promoted(cluster: Cluster) -> None:
    """An adapter with a champion, which gives no right answer from now on."""
    cluster.feed("acme/a", rows(100, "old"))
    assert only(cluster.run()).verdict is Verdict.PROMOTED
    champion = str(cluster.champion("acme/a"))[:12]
    cluster.right = lambda model: "@" in model and champion not in model


def file_rows(cluster: Cluster, file: str | None) -> list[dict[str, Any]]:
    with cluster.registry.reading() as session:
        return [json.loads(row) for row in read_rows(session, cluster.registry.artifacts, file or "")]


def test_pairs_alone_are_trained_by_a_dpo_job_and_pass_the_gate(cluster: Cluster) -> None:
    promoted(cluster)
    champion = cluster.champion("acme/a")
    cluster.feed("acme/a", pairs(60))
    outcome = only(cluster.run())
    (job,) = trained_jobs(cluster)
    assert (job.spec.objective, job.spec.start_from) == ("dpo", champion)
    assert outcome.verdict is Verdict.PROMOTED and cluster.champion("acme/a") == job.version
    assert (outcome.counts.pairs, outcome.counts.held_out, outcome.counts.train) == (54, 6, 0)
    trained, validated = file_rows(cluster, job.spec.train), file_rows(cluster, job.spec.valid)
    assert (len(trained), len(validated)) == (54, 6)
    assert "replay_on_policy" not in job.metadata, "old answers are no preferences"


def test_the_better_answer_of_a_trained_pair_is_not_held_out(cluster: Cluster) -> None:
    promoted(cluster)
    cluster.feed("acme/a", pairs(60))
    cluster.run()
    with cluster.registry.reading() as session:
        known = content.list_content(session, "acme/a")
    held = [each for each in known if each.side is ContentSide.HELD_OUT]
    assert len(known) == 160 and len(held) == 16
    # The same pairs once more, and examples of their answers, are not new; those held out are leaks.
    cluster.feed("acme/a", [*rows(60, "rated"), *rows(20, "other")])
    counts = only(cluster.run()).counts
    assert (counts.repeated, counts.leaked, counts.train + counts.held_out) == (54, 6, 20)


def test_examples_come_first_and_the_preferences_continue_their_version(cluster: Cluster) -> None:
    promoted(cluster)
    cluster.feed("acme/a", rows(100, "new"))
    cluster.feed("acme/a", pairs(40))
    outcome = only(cluster.run())
    examples, preferences = sorted(trained_jobs(cluster), key=lambda job: job.spec.objective == "dpo")
    assert (examples.spec.objective, preferences.spec.objective) == ("sft", "dpo")
    assert preferences.spec.start_from == examples.version
    assert result(cluster)["choice"] == "Then trained on preferences."
    assert outcome.verdict is Verdict.PROMOTED and cluster.champion("acme/a") == preferences.version
    with cluster.registry.reading() as session:
        assert [each.id for each in nightly.next_training_files(session, "acme/a")] == [examples.spec.train]
    # The next run continues from there, and replays the examples of the lineage.
    champion = str(cluster.champion("acme/a"))[:12]
    cluster.right = lambda model: "@" in model and champion not in model
    cluster.feed("acme/a", rows(100, "third"))
    assert only(cluster.run()).verdict is Verdict.PROMOTED
    (job,) = trained_jobs(cluster)
    assert (job.spec.objective, job.metadata["replay_plain"]) == ("sft", "64")


def test_a_correction_is_an_example_and_a_pair(cluster: Cluster) -> None:
    promoted(cluster)
    cluster.feed("acme/a", rows(60, "rated"))
    cluster.feed("acme/a", pairs(60))
    counts = only(cluster.run()).counts
    assert counts.train == counts.pairs == 60 - counts.held_out and counts.repeated == counts.held_out > 0


def test_preferences_wait_for_the_first_version(cluster: Cluster) -> None:
    cluster.feed("acme/a", pairs(40))
    assert "wait for the adapter's first champion" in only(cluster.run()).reason
    cluster.feed("acme/a", rows(100, "new"))
    assert only(cluster.run()).verdict is Verdict.PROMOTED
    assert result(cluster)["choice"] == "The preferences wait: the adapter has its first version."
    champion = str(cluster.champion("acme/a"))[:12]
    cluster.right = lambda model: "@" in model and champion not in model
    assert cluster.pending() == ["acme/a"] and only(cluster.run()).counts.pairs > 30
    assert trained_jobs(cluster)[0].spec.objective == "dpo"


def test_a_failed_preference_job_leaves_the_version_before_it(cluster: Cluster) -> None:
    promoted(cluster)

    def train(_: JobRecord) -> None:
        with cluster.registry.reading() as session:
            waiting = next(job for job in jobs.list_jobs(session, tenant=None) if not job.status.final)
        if waiting.spec.objective == "sft":
            cluster.publish(waiting)
            return
        leased = cluster.lease()
        with cluster.registry.writing() as session:
            jobs.fail(session, leased.id, leased.attempt, TrainingDiverged("The loss is NaN."), retry=False)

    cluster.pool = train
    cluster.feed("acme/a", rows(100, "new"))
    cluster.feed("acme/a", pairs(40))
    assert only(cluster.run()).verdict is Verdict.PROMOTED
    examples, preferences = sorted(trained_jobs(cluster), key=lambda job: job.spec.objective == "dpo")
    assert preferences.status is JobStatus.FAILED and cluster.champion("acme/a") == examples.version
    assert result(cluster)["choice"] == "The version before the preferences, whose job failed."


def test_few_pairs_among_examples_are_quarantined_with_the_reason(cluster: Cluster) -> None:
    promoted(cluster)
    cluster.settings.nightly_file.write_text("split: {max_bad_rows: 0.5}\n")
    cluster.feed("acme/a", [*rows(100, "new"), *pairs(19)])
    outcome = only(cluster.run())
    assert outcome.counts.quarantined == 19 and "it is one of 19 preference pairs" in outcome.quarantined[0]


def test_the_challenger_is_the_version_after_the_preferences(cluster: Cluster) -> None:
    promoted(cluster)
    cluster.right = lambda model: True
    cluster.feed("acme/a", rows(100, "new"))
    cluster.feed("acme/a", pairs(40))
    cluster.run()
    with cluster.registry.reading() as session:
        history = adapters.alias_history(session, "acme/a")
    versions = {job.version for job in trained_jobs(cluster) if job.spec.objective == "dpo"}
    assert next(each.version for each in history if each.alias == "challenger" and each.version) in versions


def test_few_pairs_alone_wait_for_others(cluster: Cluster) -> None:
    promoted(cluster)
    cluster.feed("acme/a", pairs(12))
    waiting = only(cluster.run())
    assert (waiting.verdict, waiting.reason) == (
        Verdict.WAITING,
        "12 preference pairs, and feedback.min_pairs is 20: add others.",
    )
    cluster.feed("acme/a", pairs(12, "more"))
    assert only(cluster.run()).counts.pairs == 22


def test_few_pairs_wait_while_examples_are_trained_on(cluster: Cluster) -> None:
    promoted(cluster)
    cluster.feed("acme/a", pairs(12))
    cluster.feed("acme/a", rows(30, "new"))
    outcome = only(cluster.run())
    assert (outcome.counts.train, outcome.counts.pairs, outcome.counts.quarantined) == (27, 0, 0)
    assert cluster.pending() == ["acme/a"], "the pairs"
    cluster.feed("acme/a", [*pairs(12, "more"), *rows(12, "mixed")])
    outcome = only(cluster.run())
    assert (outcome.counts.pairs + outcome.counts.train + outcome.counts.held_out, cluster.pending()) == (36, [])
    assert outcome.counts.pairs > 20


@pytest.mark.parametrize("prompted", [True, False])
def test_pairs_as_lists_of_messages_are_trained_on(cluster: Cluster, prompted: bool) -> None:
    promoted(cluster)
    lines = []
    for each in pairs(30):
        prompt = each["input"]["messages"]
        before: list[Any] = [] if prompted else prompt
        answers = {"chosen": each["preferred_output"], "rejected": each["non_preferred_output"]}
        lines.append(
            {key: [*before, *answer] for key, answer in answers.items()} | ({"prompt": prompt} if prompted else {})
        )
    cluster.feed("acme/a", lines)
    outcome = only(cluster.run())
    assert (outcome.counts.pairs, outcome.counts.held_out, outcome.counts.quarantined) == (27, 3, 0)
    assert trained_jobs(cluster)[0].spec.objective == "dpo"


def test_answers_with_labels_are_quarantined(cluster: Cluster) -> None:
    labeled = [{"messages": each["messages"], "label": True} for each in rows(3, "labeled")]
    cluster.feed("acme/a", [*rows(60), *labeled])
    outcome = only(cluster.run())
    assert outcome.counts.quarantined == 3 and "it is an answer with a label" in outcome.quarantined[0]
