"""The evaluation benchmark on a tiny base: all variants answer the same questions."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from loramill.models.catalog import Base
from loramill.serve.engine import Engine
from loramill_bench.nightly import evaluation
from loramill_bench.nightly.evaluation import Group


def test_candidates_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "PROMPTS", 2)
    groups = [Group("0", ((1,), (2,))), Group(None, ((1,), (2,)))]
    assert evaluation.in_turns(groups) == [("0", (1,)), (None, (1,)), ("0", (2,)), (None, (2,))]


def test_times_are_those_of_the_same_questions(tiny_base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TENANTS": 4, "PROMPTS": 2, "MEASURED": 2, "PROMPT_TOKENS": 5, "ANSWER_TOKENS": 3}.items():
        monkeypatch.setattr(evaluation, name, value)
    questions: list[int] = []
    answer = evaluation._answer

    def counted(engine: Engine, waves: Sequence[Sequence[tuple[str | None, tuple[int, ...]]]]) -> None:
        questions.append(sum(map(len, waves)))
        answer(engine, waves)

    monkeypatch.setattr(evaluation, "_answer", counted)
    variants: list[str] = []
    found = evaluation.results(tiny_base, variants.append)
    assert questions == [6, 24, 12]  # the warm-up; all tenants in shared batches; two of them adapter after adapter
    name = "evaluation 4x2x3"
    assert variants == [f"{name}, in shared batches", f"{name}, adapter after adapter", f"{name}, by PEFT"]
    assert [(each.target, each.better) for each in found] == [(4.0, "higher"), (8.0, "higher"), (None, "lower")]
    assert all(each.value > 0 for each in found)
