"""What nightly.yaml chooses for evaluation, in nightly runs on a real registry."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from loramill.errors import LoramillError
from loramill.pipelines.nightly.outcome import Verdict
from loramill.pipelines.nightly.questions import EvalAnswer, EvalQuestion
from loramill.registry import evaluations, nightly, nightly_again
from loramill.types import NightlyStep

from ..cluster import Cluster, only, rows
from .judges import judging


def define(cluster: Cluster, **sections: Any) -> None:
    cluster.settings.nightly_file.write_text(json.dumps(sections))


def answer_by(cluster: Cluster, right: Callable[[str, str], bool]) -> list[EvalQuestion]:
    """Decides by model and question whether an answer is right; returns the list of all questions."""
    questions: list[EvalQuestion] = []

    def answer(question: EvalQuestion) -> EvalAnswer | LoramillError:
        questions.append(question)
        text = question.messages[-1]["content"]
        return EvalAnswer(f"answer {text}" if right(question.model, text) else "I do not know")

    cluster.answer = answer  # type: ignore[method-assign]
    return questions


def held_out(questions: Sequence[EvalQuestion]) -> int:
    """The questions of the evaluation; the replay has the champion answer old training examples, too."""
    return sum(each.messages[-1]["content"].startswith("held") for each in questions)


def step(cluster: Cluster, name: str) -> NightlyStep:
    with cluster.registry.reading() as session:
        steps = nightly.list_steps(session, nightly.list_runs(session)[0].id)
    return next(each for each in steps if each.step == name)


def with_topic(examples: Sequence[dict], topic: str) -> list[dict]:
    return [each | {"metadata": {"topic": topic, "row": number}} for number, each in enumerate(examples)]


def test_a_challenger_that_fails_the_golden_set_is_rejected(cluster: Cluster, tmp_path: Path) -> None:
    golden = tmp_path / "golden" / "acme"
    golden.mkdir(parents=True)
    (golden / "a.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows(4, "golden")))
    define(cluster, evaluate={"golden": "golden/{tenant}/{adapter}.jsonl"})
    cluster.feed("acme/a", rows(60))
    assert only(cluster.run()).verdict is Verdict.PROMOTED
    cluster.feed("acme/a", rows(60, "more"))
    champion = str(cluster.champion("acme/a"))[:12]
    answer_by(cluster, lambda model, text: champion not in model and "@" in model and text != "golden 3")
    rejected = only(cluster.run())
    assert rejected.verdict is Verdict.REJECTED
    assert "it fails 1 of 4 golden examples" in rejected.reason and "100% must be right" in rejected.reason
    assert rejected.challenger == 1.0  # without the golden set
    with cluster.registry.reading() as session:
        found = evaluations.list_evaluations(session, "acme/a")
    (own,) = [each for each in found[:9] if each.slice == "golden" and each.version == rejected_version(cluster)]
    assert own.dataset.startswith("sha256:") and own.metrics["exact_match"] == 0.75
    define(cluster, evaluate={"golden": "golden/{tenant}/{adapter}.jsonl"}, gate={"min_golden": 0.75})
    with cluster.registry.writing() as session:
        nightly_again.reopen_run(session, nightly.list_runs(session)[0].id, ("gate", "promote"))
    assert only(cluster.run()).verdict is Verdict.PROMOTED


def rejected_version(cluster: Cluster) -> str:
    return str(step(cluster, "train").result["version"])


def test_a_golden_set_that_is_missing_is_read_by_the_next_run(cluster: Cluster, tmp_path: Path) -> None:
    define(cluster, evaluate={"golden": "golden.jsonl"})
    cluster.feed("acme/a", rows(60))
    waiting = only(cluster.run())
    assert waiting.verdict is Verdict.INTERRUPTED and "golden.jsonl does not exist: create it" in waiting.reason
    (tmp_path / "golden.jsonl").write_text(json.dumps(rows(1)[0]))
    assert only(cluster.run()).verdict is Verdict.PROMOTED and cluster.trained == ["acme/a"]


def test_a_scorer_that_fails_fails_its_adapter_alone(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "ours.py").write_text(
        "def half(question, reference, answer):\n    return 0.5 * (answer == reference)\n\n"
        "def bad(question, reference, answer):\n    raise KeyError(reference)\n"
    )
    for name in ("acme/bad", "acme/good"):
        cluster.feed(name, rows(60), rows(6, "other"))
    define(
        cluster,
        evaluate={"scorer": "ours.py:half"},
        gate={"metric": "scorer"},
        overrides=[{"adapters": "acme/bad", "evaluate": {"scorer": "ours.py:bad"}}],
    )
    bad, good = cluster.run()
    assert (bad.verdict, bad.stage) == (Verdict.FAILED, "evaluate") and "KeyError: 'answer other" in bad.reason
    assert (good.verdict, good.metric, good.challenger) == (Verdict.PROMOTED, "scorer", 0.5)
    assert cluster.set_aside() == {"acme/bad": "evaluate"}


def test_the_gate_decides_by_a_judge_once_it_answers(cluster: Cluster) -> None:
    def grade(body: dict[str, Any]) -> tuple[int, str]:
        return (200, "9" if "<answer>\nanswer " in body["messages"][0]["content"] else "1")

    cluster.feed("acme/a", rows(60), rows(6, "other"))
    with judging(lambda body: (401, "wrong key")) as server:
        define(cluster, evaluate={"judge": {"url": server.url, "model": "big"}}, gate={"metric": "judge"})
        waiting = only(cluster.run())
        assert waiting.verdict is Verdict.INTERRUPTED and "refuses: Error code: 401" in waiting.reason
        server.grade = grade
        judged = only(cluster.run())
    assert (judged.verdict, judged.metric, judged.base) == (Verdict.PROMOTED, "judge", pytest.approx(0.1))
    assert judged.challenger == pytest.approx(0.9) and cluster.trained == ["acme/a"]


def test_a_loss_on_one_slice_of_old_data_is_seen(cluster: Cluster) -> None:
    define(cluster, evaluate={"slices_by": "topic"})
    first = [*with_topic(rows(40, "tax"), "tax"), *with_topic(rows(40, "law"), "law")]
    held = [*with_topic(rows(30, "held law"), "law"), *with_topic(rows(8, "held tax"), "tax")]
    cluster.feed("acme/a", first, held)
    assert only(cluster.run()).verdict is Verdict.PROMOTED
    champion = str(cluster.champion("acme/a"))[:12]
    cluster.feed("acme/a", rows(60, "new"), rows(20, "held new"))
    answer_by(
        cluster, lambda model, text: "@" in model and (("new" not in text) if champion in model else "tax" not in text)
    )
    found = only(cluster.run())
    assert found.verdict is Verdict.REJECTED and "it loses 1.000 on the slice 'before:topic=tax'" in found.reason
    slices = step(cluster, "evaluate").result["slices"]
    assert {name: each["challenger"]["examples"] for name, each in slices.items()} == {
        "new": 20,
        "before": 38,
        "before:topic=law": 30,
        "before:topic=tax": 8,
    }
    assert found.challenger == pytest.approx(50 / 58)


def test_evaluation_stops_once_the_decision_is_certain(cluster: Cluster) -> None:
    """Chunks of 40: no gain on all 90 new examples needs only 30 old ones."""
    cluster.feed("acme/a", rows(60), rows(120, "held"))
    questions = answer_by(cluster, lambda model, text: "@" in model)
    first = only(cluster.run())
    assert first.verdict is Verdict.PROMOTED and held_out(questions) == 2 * 80
    assert "even with the 40 of 120 examples that were not evaluated counted as lost" in first.reason
    cluster.feed("acme/a", rows(60, "more"), rows(90, "held more"))
    questions.clear()
    held = only(cluster.run())
    assert held.verdict is Verdict.HELD and held_out(questions) == 3 * 120
    evaluated = step(cluster, "evaluate").result
    assert (evaluated["examples"], evaluated["examples_left"], evaluated["answers"]) == (120, 90, 360)
    define(cluster, gate={"confidence": 0.5})
    with cluster.registry.writing() as session:
        nightly_again.reopen_run(session, nightly.list_runs(session)[0].id, ("gate", "promote"))
    assert only(cluster.run()).verdict is Verdict.HELD
    define(cluster, evaluate={"stop_early": False})
    questions.clear()
    with cluster.registry.writing() as session:
        nightly_again.reopen_run(session, nightly.list_runs(session)[0].id, ("evaluate", "gate", "promote"))
    again = only(cluster.run())
    assert again.verdict is Verdict.HELD and held_out(questions) == 3 * 210 and "even if" not in again.reason
