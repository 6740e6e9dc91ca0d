"""Nightly runs end to end on a real registry; the pool and the gateway are functions of the test."""

from __future__ import annotations

import time
from collections.abc import Sequence

import pytest

from loramill.errors import (
    ArtifactMissing,
    Conflict,
    DefinitionInvalid,
    LeaseLost,
    LoramillError,
    NightlyBusy,
    NotFound,
)
from loramill.names import AdapterName
from loramill.pipelines.nightly import spending
from loramill.pipelines.nightly.outcome import Verdict, describe, outcomes, succeeded, summary
from loramill.pipelines.nightly.questions import EvalAnswer, EvalQuestion
from loramill.pipelines.nightly.schedule.lease import process_name
from loramill.registry import (
    adapters,
    deletion,
    evaluations,
    jobs,
    nightly,
    nightly_again,
    nightly_schedule,
)
from loramill.types import JobRecord, NightlyStep, StepStatus

from .cluster import Cluster, only, promoted_thrice, rows


def test_a_better_challenger_is_promoted_and_a_rerun_does_nothing(cluster: Cluster) -> None:
    cluster.feed("acme/a", rows(60), rows(6, "other"))
    first = only(cluster.run())
    assert (first.verdict, first.base, first.challenger) == (Verdict.PROMOTED, 0.0, 1.0)
    assert cluster.run() == [] and cluster.trained == ["acme/a"] and summary([]) == "No adapter had new data."
    shown = [describe(step) for step in cluster.steps]
    assert shown == []
    champion = cluster.champion("acme/a")
    cluster.right = lambda model: str(champion)[:12] in model
    cluster.feed("acme/a", rows(60, "more"))
    worse = only(cluster.run())
    assert (worse.verdict, worse.champion, worse.challenger) == (Verdict.REJECTED, 1.0, 0.0)
    assert "it loses 1.000 on the slice 'new', worse on 6 and better on 0 of 6 examples" in worse.reason
    assert [describe(step) for step in cluster.steps][-1] == "acme/a: rejected"
    assert cluster.champion("acme/a") == champion and succeeded([worse])
    stages = {(each.stage, each.adapter) for each in cluster.progress}
    assert stages == {("replay", None), ("train", "acme/a"), ("evaluate", None)}


def test_a_run_that_another_process_works_on_is_left_to_it(cluster: Cluster) -> None:
    cluster.feed("acme/a", rows(60))
    with cluster.registry.writing() as session:
        run = nightly_schedule.lease_run(session, "elsewhere process 1 (x)", now=time.time(), seconds=60)
    with pytest.raises(NightlyBusy, match=f"{run.id} is being worked on by elsewhere process 1"):
        cluster.run()
    assert cluster.trained == [] and cluster.pending() == ["acme/a"]
    with cluster.registry.writing() as session:  # its lease ends
        nightly_schedule.extend_lease(session, run.id, "elsewhere process 1 (x)", now=0, seconds=60)
    assert only(cluster.run()).verdict is Verdict.PROMOTED
    with cluster.registry.reading() as session:
        ended = nightly.get_run(session, run.id)
    assert ended.finished_at is not None and ended.lease_until is None and ended.holder == process_name()


def test_a_process_that_lost_its_lease_writes_nothing_more(cluster: Cluster) -> None:
    cluster.feed("acme/a", rows(60))

    def taken_over(job: JobRecord) -> None:
        cluster.publish(job)
        with cluster.registry.writing() as session:
            run = nightly.list_runs(session)[0].id
            nightly_schedule.extend_lease(session, run, process_name(), now=0, seconds=1)
            nightly_schedule.lease_run(session, "another", now=time.time(), seconds=60)

    cluster.pool = taken_over
    with pytest.raises(LeaseLost, match="has taken over the nightly run"):
        cluster.run()
    with cluster.registry.writing() as session:
        run = nightly.list_runs(session)[0].id
        assert [step.step for step in nightly.list_steps(session, run) if step.status is StepStatus.DONE] == ["collect"]
        nightly_schedule.end_lease(session, run, "another")
    assert only(cluster.run()).verdict is Verdict.PROMOTED and cluster.trained == ["acme/a"]


def test_each_step_extends_the_lease(cluster: Cluster) -> None:
    cluster.feed("acme/a", rows(60))
    left: list[float] = []
    answer = cluster.answer

    def leave_no_time(job: JobRecord) -> None:
        cluster.publish(job)
        with cluster.registry.writing() as session:
            run = nightly.list_runs(session)[0].id
            nightly_schedule.extend_lease(session, run, process_name(), now=0, seconds=1)

    def read_lease(question: EvalQuestion) -> EvalAnswer | LoramillError:
        with cluster.registry.reading() as session:
            left.append((nightly.list_runs(session)[0].lease_until or 0.0) - time.time())
        return answer(question)

    cluster.pool, cluster.answer = leave_no_time, read_lease
    assert only(cluster.run()).verdict is Verdict.PROMOTED
    assert min(left) > 0, "the end of the training extended it"


def test_a_run_retrains_only_the_adapters_of_its_definition(cluster: Cluster) -> None:
    for adapter in ("acme/a", "acme/b", "bolt/a"):
        cluster.feed(adapter, rows(60))
    cluster.settings.nightly_file.write_text("adapters: acme/*\nexclude: '*/b'\n")
    assert only(cluster.run()).adapter == "acme/a"
    assert cluster.pending() == ["acme/b", "bolt/a"]
    cluster.settings.nightly_file.write_text("adapter: x\n")
    with pytest.raises(DefinitionInvalid, match="did you mean adapters"):
        cluster.run()


def test_the_gate_decides_by_the_definition_of_each_adapter(cluster: Cluster) -> None:
    for adapter in ("acme/a", "acme/b"):
        cluster.feed(adapter, rows(60), rows(6, "other"))  # six wins: p = 0.016
    cluster.settings.nightly_file.write_text("overrides: [{adapters: acme/a, gate: {confidence: 0.99}}]\n")
    assert [(each.adapter, each.verdict) for each in cluster.run()] == [
        ("acme/a", Verdict.HELD),
        ("acme/b", Verdict.PROMOTED),
    ]


def test_the_chosen_metrics_are_computed_and_the_gates_decides(cluster: Cluster) -> None:
    """The answers gain nothing in JSON validity, and everything in the loss."""
    for adapter in ("acme/json", "acme/loss"):
        cluster.feed(adapter, rows(60), rows(6, "other"))
    cluster.settings.nightly_file.write_text(
        "evaluate: {metrics: [loss, json_valid]}\ngate: {metric: json_valid}\n"
        "overrides: [{adapters: acme/loss, evaluate: {metrics: [loss]}, gate: {metric: loss, max_loss: 0.1}}]\n"
    )
    by_json, by_loss = cluster.run()
    assert (by_json.metric, by_json.verdict, by_json.challenger) == ("json_valid", Verdict.HELD, 0.0)
    assert (by_loss.metric, by_loss.verdict) == ("loss", Verdict.PROMOTED)
    assert (by_loss.base, by_loss.challenger) == pytest.approx((3.0, 0.2))
    assert "it gains 2.800 over the base" in by_loss.reason
    with cluster.registry.reading() as session:
        found = {name: evaluations.list_evaluations(session, name)[0].metrics for name in ("acme/json", "acme/loss")}
        steps = nightly.list_steps(session, nightly.list_runs(session)[0].id)
    assert {name: sorted(each) for name, each in found.items()} == {
        "acme/json": ["json_valid", "loss"],
        "acme/loss": ["loss"],
    }
    evaluated = {step.adapter: step.result for step in steps if step.step == "evaluate"}
    # Base and challenger on six examples; of acme/json, an answer and a loss each.
    assert [evaluated[name]["answers"] for name in found] == [24, 12]
    assert evaluated["acme/json"]["tokens_answered"] > 12 * 7


def test_what_the_budget_allows_is_promoted_and_the_rest_waits(cluster: Cluster) -> None:
    for adapter in ("acme/a", "acme/b", "bolt/a"):
        cluster.feed(adapter, rows(60))
    cluster.settings.nightly_file.write_text("budget: {tokens: 1}\n")
    none = cluster.run()
    assert [each.verdict for each in none] == [Verdict.WAITING] * 3 and cluster.trained == []
    assert "0 of the run's 1 tokens are spent, and this job trains on" in none[0].reason
    assert succeeded(none) and cluster.pending() == ["acme/a", "acme/b", "bolt/a"]
    one_job = float(none[0].reason.partition("this job trains on ")[2].partition(";")[0].replace(",", ""))
    cluster.settings.nightly_file.write_text(f"budget: {{tokens: {round(one_job * 1.5)}}}\n")
    first = cluster.run()
    assert [each.verdict for each in first] == [Verdict.PROMOTED, Verdict.WAITING, Verdict.WAITING]
    assert summary(first) == "Nightly run: 1 promoted, 2 waiting." and cluster.pending() == ["acme/b", "bolt/a"]
    cluster.settings.nightly_file.write_text("")
    assert [each.verdict for each in cluster.run()] == [Verdict.PROMOTED] * 2


def test_jobs_that_have_not_begun_when_the_time_is_over_wait(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    for adapter in ("acme/a", "acme/b"):
        cluster.feed(adapter, rows(60))
    cluster.settings.nightly_file.write_text("budget: {wall_time: 1h}\n")
    began = time.time()

    def train_one(job: JobRecord) -> None:
        if not cluster.trained:
            cluster.publish(job)
        monkeypatch.setattr(spending.time, "time", lambda: began + 3601)

    cluster.pool = train_one
    found = cluster.run()
    assert sorted(each.verdict for each in found) == [Verdict.PROMOTED, Verdict.WAITING]
    waiting = next(each for each in found if each.verdict is Verdict.WAITING)
    assert waiting.reason == "the run's time of 1h is over; the next nightly run trains it."
    assert cluster.pending() == [waiting.adapter]
    with cluster.registry.reading() as session:
        assert {job.status for job in jobs.list_jobs(session, tenant=None)} == {"succeeded", "cancelled"}


def test_a_run_is_done_again_from_a_stage_with_the_results_before_it(cluster: Cluster) -> None:
    cluster.right = lambda model: False
    cluster.feed("acme/a", rows(60))
    assert only(cluster.run()).verdict is Verdict.HELD
    cluster.right = lambda model: "@" in model
    with cluster.registry.writing() as session:
        run = nightly.list_runs(session)[0].id
        assert nightly_again.reopen_run(session, run, ("evaluate", "gate", "promote")) == ["acme/a"]
    assert only(cluster.run()).verdict is Verdict.PROMOTED and cluster.trained == ["acme/a"]
    with cluster.registry.writing() as session:
        assert [each.id for each in nightly.list_runs(session)] == [run]
        with pytest.raises(NotFound, match="nightly history"):
            nightly_again.reopen_run(session, "nightly-x", ("gate",))
        other = nightly.open_run(session).id
        with pytest.raises(Conflict, match=f"{other} is open"):
            nightly_again.reopen_run(session, run, ("gate",))
        nightly.finish_run(session, other)
        with pytest.raises(Conflict, match="No adapter"):
            nightly_again.reopen_run(session, other, ("gate",))


def test_a_first_version_that_is_not_better_is_still_the_champion(cluster: Cluster) -> None:
    cluster.right = lambda model: False
    cluster.feed("acme/a", rows(60))
    held = only(cluster.run())
    assert held.verdict is Verdict.HELD and held.reason.endswith(
        "; as the first version it is the champion all the same"
    )


def test_the_results_of_each_example_are_kept_for_all_candidates(cluster: Cluster) -> None:
    promoted_thrice(cluster)
    with cluster.registry.reading() as session:
        now = adapters.get(session, "acme/a")
        records = evaluations.list_evaluations(session, "acme/a")
        gate = next(s for s in nightly.list_steps(session, nightly.list_runs(session)[0].id) if s.step == "gate")
    assert records[0].results is not None
    results = evaluations.read_results(cluster.registry.artifacts, records[0].results)
    versions = {each.candidate: each.version for each in results}
    assert len(versions) == 4 and versions["base"] is None
    assert (versions["challenger"], versions["champion"]) == (now.champion, now.previous)
    assert {each.slices for each in results} == {("new",), ("before",)}
    answered = next(each for each in results if each.candidate == "challenger" and each.slices == ("new",))
    assert answered.answer.startswith("answer three") and answered.scores["exact_match"] == 1.0
    new = gate.result["evidence"][0]
    assert (gate.result["verdict"], new["name"], new["gain"], new["wins"]) == ("promote", "new", 1.0, 6)
    assert cluster.registry.remove_unreferenced(older_than=-1) == 0
    with cluster.registry.writing() as session:
        deletion.delete_adapter(session, AdapterName.parse("acme/a"))
    cluster.registry.remove_unreferenced(older_than=-1)
    for each in {record.results for record in records}:
        with pytest.raises(ArtifactMissing):
            evaluations.read_results(cluster.registry.artifacts, str(each))


def test_a_previous_version_that_was_deleted_is_left_out(cluster: Cluster) -> None:
    def pool(job: JobRecord, earlier: Sequence[str]) -> None:
        cluster.publish(job)
        with cluster.registry.writing() as session:
            deletion.delete_version(session, AdapterName.parse("acme/a"), earlier[0], force=True)

    promoted_thrice(cluster, pool)
    with cluster.registry.reading() as session:
        records = evaluations.list_evaluations(session, "acme/a")
    results = evaluations.read_results(cluster.registry.artifacts, str(records[0].results))
    assert {each.candidate for each in results} == {"base", "champion", "challenger"}


def test_runs_of_an_older_gate_are_shown(cluster: Cluster) -> None:
    score = {"examples": 2, "exact_match": 0.5, "token_f1": 0.25}
    results = {
        "evaluate": {"new": {"base": score, "challenger": {**score, "token_f1": 0.75}}},
        "gate": {"promote": True, "reason": "it gains 0.500"},
        "promote": {"promoted": False, "champion": "c"},
    }
    steps = [
        NightlyStep(run="night-1", adapter="acme/a", step=step, status=StepStatus.DONE, result=result)
        for step, result in results.items()
    ]
    held = only(outcomes(steps))
    assert (held.verdict, held.base, held.challenger, held.reason) == (Verdict.HELD, 0.25, 0.75, "it gains 0.500")
    assert only(outcomes(steps[:2])).verdict is Verdict.PROMOTED
    assert [describe(step) for step in steps[1:]] == ["acme/a: it is better", "acme/a: held"]


def test_old_runs_whose_failure_has_no_reason_are_shown(cluster: Cluster) -> None:
    step = NightlyStep(run="night-1", adapter="acme/a", step="train", status=StepStatus.FAILED, result={})
    assert only(outcomes([step])).reason == "train: no reason was recorded."
