"""Scorers of users, in real processes."""

from __future__ import annotations

import json
import time
from datetime import timedelta
from pathlib import Path

import pytest

from loramill.data.examples import read_examples
from loramill.errors import EvaluationError
from loramill.pipelines.nightly.evaluation.items import AnsweredExample
from loramill.pipelines.nightly.evaluation.scorer import score_with

MINUTE = timedelta(minutes=1)
ROW = {"messages": [{"role": "user", "content": "Größe?"}, {"role": "assistant", "content": "zwölf"}]}


def answered(*answers: str) -> list[AnsweredExample]:
    example = read_examples(json.dumps(ROW).encode(), "one.jsonl").examples[0]
    return [AnsweredExample(example, answer) for answer in answers]


def scorer(folder: Path, body: str) -> str:
    file = folder / "results.py"  # also the name of a module next to the scorer's process
    file.write_text(f"import os, subprocess, time\n\ndef score(question, reference, answer):\n    {body}\n")
    return f"{file}:score"


def test_a_scorer_gets_question_reference_and_answer(tmp_path: Path) -> None:
    body = (
        "print('a scorer may print'); assert question == [{'role': 'user', 'content': 'Größe?'}]; "
        "return answer == reference if len(answer) > 2 else len(answer) / 4"
    )
    assert score_with(scorer(tmp_path, body), answered("zwölf", "elf", "a", ""), MINUTE) == [1.0, 0.0, 0.25, 0.0]


def test_a_scorer_may_be_in_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "__init__.py").write_text("")
    (tmp_path / "ours" / "scores.py").write_text("def length(question, reference, answer):\n    return 0.5\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert score_with("ours.scores:length", answered("a"), MINUTE) == [0.5]


@pytest.mark.parametrize("result", ["numpy.float32(0.5)", "numpy.bool_(True)", "numpy.array(0.5)"])
def test_a_scorer_may_return_numbers_of_numpy(tmp_path: Path, result: str) -> None:
    (score,) = score_with(scorer(tmp_path, f"import numpy; return {result}"), answered("a"), MINUTE)
    assert score == (1.0 if "True" in result else 0.5)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (
            "return 1 / len(answer)",
            r"failed on answer 2 of 3: ZeroDivisionError: division by zero \(results.py, line 4",
        ),
        ("return float('nan')", "failed on answer 1 of 3: it returned nan, which is not a number from 0 to 1"),
        ("return 'good'", "it returned 'good', which is not a number"),
        ("return 2", "it returned 2, which"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("print('bye', flush=True); os._exit(0)", "ended after 0 of 3 answers; the last line that it printed: bye"),
        ("return 1\n  broken", "IndentationError"),
    ],
)
def test_a_scorer_that_fails_says_where(tmp_path: Path, body: str, reason: str) -> None:
    with pytest.raises(EvaluationError, match=reason):
        score_with(scorer(tmp_path, body), answered("a", "", "b"), MINUTE)


@pytest.mark.parametrize("target", ["missing.module:score", "{folder}/missing.py:score", "json:missing"])
def test_a_scorer_that_does_not_exist_fails(tmp_path: Path, target: str) -> None:
    with pytest.raises(EvaluationError, match="missing"):
        score_with(target.format(folder=tmp_path), answered("a"), MINUTE)


def test_a_scorer_that_hangs_is_killed_with_its_children(tmp_path: Path) -> None:
    mark = tmp_path / "alive"
    child = f"while true; do touch {mark}; sleep 0.05; done"
    body = f"subprocess.Popen(['sh', '-c', {child!r}]); time.sleep(600)"
    with pytest.raises(EvaluationError, match=r"took longer than 3s for 1 answers.*scorer_time_limit"):
        score_with(scorer(tmp_path, body), answered("a"), timedelta(seconds=3))
    mark.unlink()
    time.sleep(0.5)
    assert not mark.exists()
