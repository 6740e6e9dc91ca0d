"""The summary of a run: what it contains, and that it is right for every state that the database may contain."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loramill.pipelines.nightly.outcome import Verdict
from loramill.pipelines.nightly.report.cost import JobInterval
from loramill.pipelines.nightly.report.html import render_html
from loramill.pipelines.nightly.report.message import slack_message
from loramill.pipelines.nightly.report.schema import AdapterReport, NightlyReport
from loramill.pipelines.nightly.report.summarize import CURVE_POINTS, summarize
from loramill.types import NightlyStep, StepStatus

from .runs import NEW, OLD, STAGES, aside, complete, failed, job, job_id, metrics, records, step


def only(report: NightlyReport) -> AdapterReport:
    (adapter,) = report.adapters
    return adapter


def test_a_promoted_adapter_has_its_scores_decision_and_costs() -> None:
    report = summarize(records(complete("acme/a")))
    found = only(report)
    assert report.succeeded and report.summary == "Nightly run: 1 promoted."
    assert (found.verdict, found.reason) == (Verdict.PROMOTED, "it gains 0.200")
    # 40 new and 60 old examples; the slice of a part is not counted again.
    assert found.before == pytest.approx(0.4 * 0.5 + 0.6 * 0.7)
    assert found.after == found.challenger == pytest.approx(0.4 * 0.7 + 0.6 * 0.7)
    assert found.base == pytest.approx(0.4 * 0.3 + 0.6 * 0.2)
    assert (found.old_champion, found.version, found.champion) == (OLD, NEW, NEW)
    assert found.gain is not None and (found.gain.slice, found.gain.against) == ("new", "champion")
    assert (found.gain.low, found.gain.high) == pytest.approx((0.15, 0.25))
    assert [each.slice for each in found.scores] == ["new", "before", "new:topic=tax"] and len(found.gains) == 3
    assert found.rows["train"] == 200 and found.quarantine is not None
    assert (found.quarantine.rows, found.quarantine.file, len(found.quarantine.reasons)) == (2, "file-9", 2)
    assert found.training is not None and (found.training.steps, found.training.seconds) == (60, 200.0)
    assert found.cost.tokens_trained == 12_000 and found.cost.device_seconds == 200.0
    assert [history.change for history in found.history] == pytest.approx([-0.06, -0.04, -0.02])
    commands = [link.command for link in found.links]
    assert f"loramill jobs show {job_id('acme/a')}" in commands and "loramill rollback acme/a" in commands
    assert "loramill files show file-9 --content" in commands


def test_a_held_adapter_keeps_its_score_and_can_be_promoted_by_hand() -> None:
    found = only(summarize(records(complete("acme/a", -0.1, promote=False, reason="it loses 0.100"))))
    assert found.verdict is Verdict.HELD and found.after == found.before != found.challenger
    assert f"loramill promote acme/a@{NEW[:12]}" in [link.command for link in found.links]


def test_a_failure_comes_first_and_makes_the_run_unsuccessful() -> None:
    report = summarize(records([*complete("acme/a"), *failed("bolt/b"), *complete("acme/c", promote=False)]))
    assert [each.adapter for each in report.adapters] == ["bolt/b", "acme/c", "acme/a"]
    assert not report.succeeded and report.totals.verdicts == {"failed": 1, "held": 1, "promoted": 1}
    assert "loramill nightly retry bolt/b" in [link.command for link in report.adapters[0].links]


def test_an_interrupted_run_did_not_succeed() -> None:
    report = summarize(records(complete("acme/a"), interrupted="The gateway is away."))
    assert not report.succeeded and report.interrupted == "The gateway is away."


def test_what_was_not_recorded_is_absent() -> None:
    waiting = step("acme/a", "collect", {"waiting": "4 new examples so far"}, StepStatus.PENDING)
    found = only(summarize(records([waiting], jobs={}, metrics={}, intervals=[], scores={}, device=None)))
    assert found.verdict is Verdict.WAITING
    numbers = (found.before, found.after, found.gain, found.training, found.quarantine, found.version)
    assert set(numbers) == {None} and not found.scores and not found.history
    assert (found.cost.device, found.cost.device_seconds, found.cost.answers) == (None, 0.0, None)


def test_a_deleted_job_leaves_the_rest_of_the_report() -> None:
    found = only(summarize(records(complete("acme/a"), jobs={}, metrics={})))
    assert found.training is None and found.cost.tokens_trained == 0 and found.after is not None


def test_runs_of_older_versions_are_reported() -> None:
    new = {each.step: each.result for each in complete("acme/a")}
    old = {
        "collect": {"champion": OLD, "slices": {}},
        "evaluate": new["evaluate"]["slices"],
        "gate": {"promote": True, "reason": "it gains 0.300 over the champion"},
        "promote": {"promoted": True, "champion": NEW},
    }
    steps = [step("acme/a", stage, (new | old)[stage]) for stage in STAGES]
    found = only(summarize(records(steps)))
    assert found.verdict is Verdict.PROMOTED and found.gain is None and found.gains == () and found.before is not None


def test_a_long_curve_keeps_its_ends_and_its_validations() -> None:
    found = only(summarize(records(complete("acme/a"), metrics={job_id("acme/a"): metrics(5000)})))
    assert found.training is not None
    steps = [each.step for each in found.training.curve]
    assert len(steps) <= CURVE_POINTS and steps == sorted(steps) and (steps[0], steps[-1]) == (1, 5000)
    assert sum(each.valid is not None for each in found.training.curve) == CURVE_POINTS // 2


def test_a_loss_that_is_not_finite_is_left_out() -> None:
    broken = [{"step": 1, "train_loss": float("nan")}, {"step": 2, "train_loss": 0.5, "valid_loss": float("inf")}]
    report = summarize(records(complete("acme/a"), metrics={job_id("acme/a"): broken}))
    training = only(report).training
    assert training is not None and [(each.step, each.valid) for each in training.curve] == [(2, None)]
    json.loads(report.model_dump_json(), parse_constant=pytest.fail)


def test_only_data_of_earlier_runs_is_listed_as_set_aside() -> None:
    report = summarize(records(failed("acme/a"), set_aside=[aside("acme/a", "nightly-1"), aside("acme/b")]))
    assert [each.adapter for each in report.set_aside] == ["acme/b"]


def any_steps(adapter: str) -> st.SearchStrategy[list[NightlyStep]]:
    """What the database may contain about an adapter: some stages, the last of them in any state."""

    def build(
        count: int, status: StepStatus, promote: bool, ending: dict[str, Any], broken: set[str]
    ) -> list[NightlyStep]:
        steps = complete(adapter, promote=promote)[:count]
        last = steps[-1]
        if status is not StepStatus.DONE:
            steps[-1] = step(adapter, last.step, ending, status)
        reduced = {"promote": promote, "reason": "a reason"}
        return [
            step(adapter, each.step, reduced if each.step == "gate" else {}, each.status)
            if each.step in broken and each.status is StepStatus.DONE
            else each
            for each in steps
        ]

    endings = st.sampled_from(
        [
            {"error": "The loss is NaN.", "data": "set aside"},
            {"error": "Line one\nline two\nline three", "data": "waiting", "job": job_id(adapter)},
            {"error": "The adapter was deleted during the nightly run.", "deleted": True},
            {"waiting": "4 new examples so far", "error": None},
            {"job": job_id(adapter)},
            {},
        ]
    )
    broken = st.sets(st.sampled_from(["collect", "train", "gate"]))
    return st.builds(build, st.integers(1, len(STAGES)), st.sampled_from(StepStatus), st.booleans(), endings, broken)


@st.composite
def any_runs(draw: st.DrawFn) -> dict[str, Any]:
    adapters = draw(st.lists(st.sampled_from(["acme/a", "acme/b", "bolt/a", "bolt/c"]), unique=True))
    steps = [each for adapter in adapters for each in draw(any_steps(adapter))]
    known = [each for each in adapters if draw(st.booleans())]
    times = st.floats(0, 1000)
    intervals = [
        JobInterval(job_id(each), draw(st.sampled_from(["one", "two"])), start, start + draw(times))
        for each in known
        for start in draw(st.lists(times, max_size=3))
    ]
    return {
        "steps": steps,
        "jobs": {job_id(each): job(each, trained_tokens=draw(st.integers(0, 9))) for each in known},
        "intervals": intervals,
        "interrupted": draw(st.none() | st.just("The gateway is away.")),
        "device": draw(st.sampled_from([None, "cpu", "gpu"])),
    }


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(any_runs())
def test_every_run_has_a_report_whose_totals_are_the_sums_of_its_parts(run: dict[str, Any]) -> None:
    report = summarize(records(**run))
    totals, adapters = report.totals, report.adapters
    assert {each.adapter for each in adapters} == {each.adapter for each in run["steps"]}
    assert totals.adapters == len(adapters) == sum(totals.verdicts.values())
    assert totals.verdicts == Counter(each.verdict for each in adapters)
    assert totals.cost.tokens_trained == sum(each.cost.tokens_trained for each in adapters)
    assert totals.cost.device_seconds == pytest.approx(sum(each.cost.device_seconds for each in adapters))
    assert totals.quarantined == sum(each.quarantine.rows for each in adapters if each.quarantine)
    for name in totals.rows:
        assert totals.rows[name] == sum(each.rows.get(name, 0) for each in adapters)
    assert NightlyReport.model_validate_json(report.model_dump_json()) == report
    assert report.run in render_html(report) and slack_message(report, "/tmp/report.html")["blocks"]
