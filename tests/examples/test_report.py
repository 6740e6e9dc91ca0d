"""The demo's report: what its headline says, and what its page holds."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import ModuleType

import pytest

from loramill.pipelines.nightly.questions import EvalAnswer
from loramill.pipelines.nightly.text_metrics import Score

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("report")


def score(exact: float, f1: float | None = None, examples: int = 40) -> Score:
    return Score(examples, exact, exact if f1 is None else f1, exact)


def line(report: ModuleType, *, spoiled: bool, promoted: bool):
    slices = {"new": {role: {"token_f1": 0.5} for role in ("base", "challenger")}}
    return report.NightlyResult("acme/a", spoiled, promoted, "it gains 0.212", "a" * 64, "b" * 64, slices)


def test_a_tie_is_a_tie(report: ModuleType) -> None:
    scores = {"b/x": score(0.0), "a/x": score(0.0), "c/x": score(0.0, 0.1)}
    assert report.best(scores) == ("c/x",)
    del scores["c/x"]
    assert report.best(scores) == ("a/x", "b/x")
    row = report.Row("t", score(0.0), score(0.0), ("a/x", "b/x"), score(0.0))
    assert (row.wins, row.ties, row.other_name) == (False, True, "tie of 2")
    assert report.Row("t", score(0.0), score(0.5), ("a/x",), score(0.0)).other_name == "a"


def test_the_headline_names_what_was_shown(report: ModuleType) -> None:
    rows = [report.Row("t", score(0.0), score(exact), ("a/x",), score(0.5)) for exact in (1.0, 0.5)]
    good, sentences = report.verdict(rows, [line(report, spoiled=True, promoted=False)])
    assert not good and sentences == [
        "1 of 2 adapters answer their own tenant's questions better than the base and every other adapter "
        "(1 more ties): 75% are exactly right, 0% by the base alone.",
        "The nightly run held back what acme/a learned from spoiled data.",
    ]
    assert report.verdict(rows[:1], [line(report, spoiled=False, promoted=True)])[0]
    assert not report.verdict(rows[:1], [line(report, spoiled=True, promoted=True)])[0]


def test_the_page_names_base_versions_and_cut_answers(report: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    curve = report.Curve({1: 2.0, 2: 1.0}, {2: 1.5})
    report.write_report(
        path,
        base="smollm2-135m",
        rows=[report.Row("acme", score(0.0), score(1.0), ("b/x", "c/x"), score(0.0))],
        runs=[report.Run("acme/a", "c" * 64, 60, 12345, 60.0, curve)],
        samples=[report.Sample("acme", "<b>Q</b>", "right", EvalAnswer("right"), EvalAnswer("I am a", truncated=True))],
        nightly_results=[line(report, spoiled=True, promoted=False)],
        seconds=90,
    )
    page = path.read_text(encoding="utf-8")
    for text in (
        "<b>smollm2-135m</b>",
        "<code>cccccccccccc</code>",
        "12,345",
        "60 s",
        "(tie of 2)",
        "<code>I am a…</code>",
        "<code>right</code> ✓",
        "&lt;b&gt;Q&lt;/b&gt;",
        "Spoiled data",
        "It gains 0.212. Version",
        "1.5 minutes",
    ):
        assert text in page, text
    # A phone has 390 pixels: no column is wider than the page, and tables turn into cards.
    assert all("min(100%" in grid for grid in re.findall(r"minmax\([^)]*\)", page))
    assert "@media (max-width: 640px)" in page and "prefers-color-scheme: dark" in page
