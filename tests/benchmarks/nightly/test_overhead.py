"""The overhead of nightly runs, with a few adapters: real runs whose pool neither trains nor answers."""

from __future__ import annotations

import pytest

from loramill.errors import JobError, LoramillError, ModelNotFound
from loramill.models.catalog import Base
from loramill.pipelines.nightly import run
from loramill_bench.nightly import overhead


@pytest.fixture(autouse=True)
def few_examples(monkeypatch: pytest.MonkeyPatch, base: Base) -> None:
    monkeypatch.setattr(overhead, "FIRST", 60)
    monkeypatch.setattr(overhead, "NEW", 60)
    monkeypatch.setattr(run, "find_base", lambda *_: base)


def test_the_second_run_has_the_target_and_its_stages_add_up() -> None:
    runs: list[str] = []
    found = overhead.results(runs.append, adapters=2)
    names = ["overhead: 60 new examples", "overhead: 60 new examples with 60 known"]
    assert runs == [f"{name}, 2 adapters" for name in names]
    totals = [each for each in found if each.case.endswith("per adapter")]
    assert [each.case for each in totals] == [f"{name}, per adapter" for name in names]
    assert [each.target for each in totals] == [None, 0.05]
    for total in totals:
        stages = [each for each in found if each.case.startswith(f"{total.case}: ")]
        assert [each.case.rpartition(" ")[2] for each in stages] == [*run_stages(), "report"]
        assert sum(each.value for each in stages) == pytest.approx(total.value)
        assert all(each.value > 0 for each in stages)


def test_a_run_that_does_not_decide_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: object, questions: list[object], *_: object) -> list[LoramillError]:
        return [ModelNotFound("There is no such model.")] * len(questions)

    monkeypatch.setattr(overhead.InstantPool, "answer_all", refuse)
    with pytest.raises(JobError, match="2 of 2 adapters reached no decision"):
        overhead.results(lambda name: None, adapters=2)


def run_stages() -> tuple[str, ...]:
    return ("collect", "train", "evaluate", "gate", "promote")
