"""On-policy replay in nightly runs on a real registry; the pool and the gateway are functions of the test."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from loramill.errors import LoramillError, ModelNotFound, NotRunning
from loramill.pipelines.nightly.collection.past import read_rows
from loramill.pipelines.nightly.outcome import Verdict
from loramill.pipelines.nightly.questions import EvalAnswer, EvalQuestion, Keep
from loramill.registry import content, datasets, jobs, nightly, nightly_answers
from loramill.types import ContentSide, JobRecord, StepStatus

from ..cluster import Cluster, only, rows


def train_rows(cluster: Cluster, job: JobRecord) -> list[dict[str, Any]]:
    with cluster.registry.reading() as session:
        return [json.loads(row) for row in read_rows(session, cluster.registry.artifacts, job.spec.train)]


def last_job(cluster: Cluster, adapter: str = "acme/a") -> JobRecord:
    with cluster.registry.reading() as session:
        return next(job for job in jobs.list_jobs(session, tenant=None) if job.spec.adapter == adapter)


def collected(cluster: Cluster, adapter: str = "acme/a") -> dict[str, Any]:
    with cluster.registry.reading() as session:
        steps = nightly.list_steps(session, nightly.list_runs(session)[0].id)
        return next(step.result for step in steps if step.adapter == adapter and step.step == "collect")


def verbose(question: EvalQuestion) -> EvalAnswer:
    """An answer of another wording that scores 0.86 against that of `rows`."""
    return EvalAnswer(f"my answer {question.messages[-1]['content']}")


def test_champions_answer_old_prompts_together_and_what_scores_is_trained_on(
    cluster: Cluster,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for adapter in ("acme/a", "bolt/b"):
        cluster.feed(adapter, rows(200, "old"))
    cluster.run()
    champions = {adapter: cluster.champion(adapter) for adapter in ("acme/a", "bolt/b")}
    assert collected(cluster)["replay"] == {"plain": 0}, "the first version has no champion to answer"
    for adapter in champions:
        cluster.feed(adapter, rows(100, "new"))
    batches: list[set[str]] = []
    answer_all = cluster.answer_all

    def spied(questions: Sequence[EvalQuestion], *rest: Any) -> list[EvalAnswer | LoramillError]:
        batches.append({question.model for question in questions})
        return answer_all(questions, *rest)

    monkeypatch.setattr(cluster, "answer_all", spied)
    monkeypatch.setattr(cluster, "answer", verbose)
    cluster.run()
    assert batches[0] == {f"{adapter}@{str(champion)[:12]}" for adapter, champion in champions.items()}, (
        "one shared batch"
    )
    replay = collected(cluster)["replay"]
    assert replay == {"plain": 64, "prompts": 34, "unanswered": 0, "on_policy": 17}  # 17 of 90 + 64 + 17
    job = last_job(cluster)
    assert job.metadata["replay_plain"] == "64" and job.metadata["replay_on_policy"] == "17"
    trained = train_rows(cluster, job)
    answers = [row["messages"][-1]["content"] for row in trained]
    own = [each for each in answers if each.startswith("my answer old")]
    assert (len(trained), len(own), len(set(own))) == (90 + 64 + 17, 17, 17)
    assert job.spec.epochs is not None and job.spec.steps == job.spec.epochs * -(-len(trained) // job.spec.batch_size)
    with cluster.registry.reading() as session:
        held = {each.digest for each in content.list_content(session, "acme/a") if each.side is ContentSide.HELD_OUT}
        assert held and nightly_answers.list_answers(session, nightly.list_runs(session)[0].id) == {}
        names = [each.filename for each in datasets.list_datasets(session, "acme") if "train" in each.filename]
    assert len(names) == 2, "the file without the replayed answers is deleted"


def test_held_out_examples_are_neither_requested_nor_trained(
    cluster: Cluster,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cluster.feed("acme/a", rows(100, "old"))
    cluster.run()
    held = held_out_prompts(cluster)
    requested: list[str] = []

    def answer(question: EvalQuestion) -> EvalAnswer:
        requested.append(str(question.messages[-1]["content"]))
        return EvalAnswer(f"answer {requested[-1]}")

    cluster.settings.nightly_file.write_text("replay: {on_policy: 0.6}\n")
    cluster.feed("acme/a", rows(100, "new"))
    monkeypatch.setattr(cluster, "answer", answer)
    cluster.run()
    replay = collected(cluster)["replay"]
    assert len(held) == 10 and replay["on_policy"] == replay["prompts"] == 90, "all old examples that are not held out"
    assert not set(requested[:90]) & held
    prompts = {row["messages"][0]["content"] for row in train_rows(cluster, last_job(cluster))}
    assert not prompts & (held | held_out_prompts(cluster))


def held_out_prompts(cluster: Cluster) -> set[str]:
    with cluster.registry.reading() as session:
        slices = [
            collected(cluster)["slices"][name] for name in ("new", "before") if name in collected(cluster)["slices"]
        ]
        found = [row for file in slices for row in read_rows(session, cluster.registry.artifacts, file)]
    return {json.loads(row)["messages"][0]["content"] for row in found}


def test_a_killed_run_asks_no_finished_question_again(
    cluster: Cluster,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cluster.feed("acme/a", rows(100, "old"))
    cluster.run()
    cluster.feed("acme/a", rows(100, "new"))
    requested: list[EvalQuestion] = []

    def dies(
        questions: Sequence[EvalQuestion], report: Callable[[int], None], keep: Keep
    ) -> list[EvalAnswer | LoramillError]:
        for index, question in enumerate(questions[:7]):
            requested.append(question)
            keep(index, verbose(question))
        raise NotRunning("the gateway is gone")

    monkeypatch.setattr(cluster, "answer_all", dies)
    with pytest.raises(NotRunning):
        cluster.run()
    monkeypatch.undo()
    finished = cluster.answer

    def spied(question: EvalQuestion) -> EvalAnswer | LoramillError:
        requested.append(question)
        return finished(question)

    cluster.answer = spied  # type: ignore[method-assign]
    assert only(cluster.run()).stage == "promote"
    of_champion = [each for each in requested if str(each.messages[-1]["content"]).startswith("old")]
    replay = collected(cluster)["replay"]
    assert len(of_champion[: replay["prompts"]]) == len(set(map(str, of_champion[: replay["prompts"]])))
    answers = [row["messages"][-1]["content"] for row in train_rows(cluster, last_job(cluster))]
    assert sum(each.startswith("my answer") for each in answers) == 7, "the answers before the outage are used"


def test_answers_that_do_not_come_are_examples_less(
    cluster: Cluster,
) -> None:
    cluster.feed("acme/a", rows(100, "old"))
    cluster.run()
    cluster.feed("acme/a", rows(100, "new"))
    refused = ModelNotFound("no such model")
    answer = cluster.answer
    cluster.answer = lambda question: refused if len(cluster.trained) == 1 else answer(question)  # type: ignore[method-assign]
    assert only(cluster.run()).verdict is not Verdict.FAILED
    replay = collected(cluster)["replay"]
    assert replay["on_policy"] == 0 and replay["unanswered"] == replay["prompts"] > 0
    assert len(train_rows(cluster, last_job(cluster))) == 90 + replay["plain"]


def test_replay_draws_from_all_versions_that_the_champion_continues(
    cluster: Cluster,
) -> None:
    champion = "none"
    for word in ("first", "second", "third"):
        cluster.feed("acme/a", rows(100, word))
        cluster.right = lambda model, champion=champion: "@" in model and champion not in model
        assert only(cluster.run()).verdict is Verdict.PROMOTED, word
        champion = str(cluster.champion("acme/a"))[:12]
    words = [row["messages"][0]["content"].split()[0] for row in train_rows(cluster, last_job(cluster))]
    assert {word: words.count(word) > 10 for word in set(words)} == dict.fromkeys(("first", "second", "third"), True)


def test_no_on_policy_replay_asks_nothing(cluster: Cluster) -> None:
    cluster.settings.nightly_file.write_text("replay: {on_policy: 0, plain_examples: 5}\n")
    for word in ("old", "new"):
        cluster.feed("acme/a", rows(100, word))
        cluster.run()
    assert collected(cluster)["replay"] == {"plain": 5}
    assert ("replay", None) not in {(each.stage, each.adapter) for each in cluster.progress}
    with cluster.registry.reading() as session:
        run = nightly.list_runs(session)[0]
        assert all(step.status is StepStatus.DONE for step in nightly.list_steps(session, run.id))
