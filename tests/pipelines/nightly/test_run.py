"""Nightly runs end to end on a real registry; the pool and the gateway are functions of the test."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest
from sqlalchemy import text

from loramill.data.tokenizer import ChatTokenizer
from loramill.errors import (
    ArtifactMissing,
    Conflict,
    DefinitionInvalid,
    InvalidRequest,
    LeaseLost,
    LoramillError,
    ModelNotFound,
    NightlyBusy,
    NotFound,
    NotRunning,
    TrainingDiverged,
    Unavailable,
)
from loramill.models.catalog import Base
from loramill.names import AdapterName
from loramill.pipelines.nightly import run, spending, train
from loramill.pipelines.nightly.collection import collect
from loramill.pipelines.nightly.collection.counts import CollectedCounts
from loramill.pipelines.nightly.context import NightlyProgress
from loramill.pipelines.nightly.outcome import Outcome, Verdict, describe, outcomes, succeeded, summary
from loramill.pipelines.nightly.questions import EvalAnswer, EvalQuestion, Keep
from loramill.pipelines.nightly.run import run_nightly
from loramill.pipelines.nightly.schedule.lease import process_name
from loramill.registry import (
    Registry,
    adapters,
    datasets,
    deletion,
    evaluations,
    jobs,
    nightly,
    nightly_again,
    nightly_schedule,
    tenants,
)
from loramill.settings import Settings
from loramill.types import JobRecord, NightlyStep, StepStatus, VersionRecord

from ...databases import create_sqlite_database


class Cluster:
    """A registry with tenants, a pool that trains whenever the gateway is checked, and that gateway."""

    def __init__(self, registry: Registry, settings: Settings) -> None:
        self.registry, self.settings = registry, settings
        self.trained: list[str] = []
        self.steps: list[NightlyStep] = []
        self.progress: list[NightlyProgress] = []
        self.pool: Callable[[JobRecord], None] = self.publish
        self.checks: list[LoramillError | None] = []
        self.refuse: dict[str, LoramillError] = {}
        self.right: Callable[[str], bool] = lambda model: "@" in model

    def run(self) -> list[Outcome]:
        self.steps.clear()
        run = run_nightly(
            self.registry,
            self.settings,
            report=self.steps.append,
            progress=self.progress.append,
            gateway=self,
        )
        return self.outcomes(run.id)

    def outcomes(self, run: str) -> list[Outcome]:
        with self.registry.reading() as session:
            deleted = [step for step in self.steps if step.result.get("deleted")]
            return outcomes([*nightly.list_steps(session, run), *deleted])

    def check(self) -> None:
        if self.checks and (error := self.checks.pop(0)) is not None:
            raise error
        with self.registry.writing() as session:
            waiting = [job for job in jobs.list_jobs(session, tenant=None) if not job.status.final]
        for job in waiting:
            self.pool(job)

    def answer_all(
        self, questions: Sequence[EvalQuestion], report: Callable[[int], None], keep: Keep = lambda index, answer: None
    ) -> list[EvalAnswer | LoramillError]:
        report(len(questions))
        answers = [self.answer(question) for question in questions]
        for index, answer in enumerate(answers):
            if isinstance(answer, EvalAnswer):
                keep(index, answer)
        return answers

    def answer(self, question: EvalQuestion) -> EvalAnswer | LoramillError:
        adapter = question.model.partition("@")[0]
        if adapter in self.refuse:
            return self.refuse[adapter]
        right = self.right(question.model)
        if question.reference is not None:
            return EvalAnswer("", loss=0.2 if right else 3.0, tokens=len(question.reference.tokens))
        text = f"answer {question.messages[-1]['content']}" if right else "I do not know"
        return EvalAnswer(text, tokens=7)

    def feed(self, adapter: str, rows: Sequence[dict], valid: Sequence[dict] = ()) -> list[str]:
        name = AdapterName.parse(adapter)
        with self.registry.writing() as session:
            files = [self.file(session, name.tenant, each) for each in (rows, valid) if each]
            nightly.add_data(session, name, files[0], files[1] if valid else None)
        return files

    def file(self, session, tenant: str, rows: Sequence[dict]) -> str:
        raw = "".join(json.dumps(row) + "\n" for row in rows).encode()
        artifact = self.registry.artifacts.put({"data.jsonl": raw})
        return datasets.create(session, tenant, "rows.jsonl", artifact, len(raw), len(rows)).id

    def lease(self) -> JobRecord:
        with self.registry.writing() as session:
            job = jobs.lease(session, "worker", now=time.time(), seconds=60, max_attempts=1)
        assert job is not None
        return job

    def publish(self, _: JobRecord) -> None:
        job = self.lease()
        content = {"adapter_config.json": b"{}", "adapter_model.safetensors": job.id.encode()}
        version = VersionRecord(
            id=self.registry.artifacts.put(content),
            adapter=job.spec.adapter,
            job=job.id,
            base=job.spec.base,
            bytes=9,
            created_at=time.time(),
        )
        with self.registry.writing() as session:
            jobs.publish(session, job.id, job.attempt, version)
        self.trained.append(job.spec.adapter)

    def champion(self, adapter: str) -> str | None:
        with self.registry.reading() as session:
            return adapters.get(session, adapter).champion

    def pending(self) -> list[str]:
        with self.registry.reading() as session:
            return [each.adapter for each in nightly.pending_data(session)]

    def set_aside(self) -> dict[str, str]:
        with self.registry.reading() as session:
            return {each.adapter: each.stage for each in nightly.list_set_aside(session)}


@pytest.fixture
def cluster(tmp_path: Path, base: Base, tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    settings = Settings.load(home=tmp_path)
    create_sqlite_database(url := f"sqlite:///{tmp_path / 'loramill.db'}")
    registry = Registry.open(url, (tmp_path / "artifacts").as_uri())
    with registry.writing() as session:
        for tenant in ("acme", "bolt"):
            tenants.create(session, tenant)
    monkeypatch.setattr(run, "find_base", lambda *_: base)
    monkeypatch.setattr(ChatTokenizer, "load", lambda *_: tokenizer)
    monkeypatch.setattr(train.time, "sleep", lambda seconds: None)
    yield Cluster(registry, settings)
    registry.close()


def rows(count: int, word: str = "thing") -> list[dict]:
    return [
        {
            "messages": [
                {"role": "user", "content": f"{word} {i}"},
                {"role": "assistant", "content": f"answer {word} {i}"},
            ]
        }
        for i in range(count)
    ]


def only(found: list[Outcome]) -> Outcome:
    (outcome,) = found
    return outcome


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


def test_data_since_a_time_is_used_again(cluster: Cluster) -> None:
    cluster.feed("acme/a", rows(60))
    cluster.run()
    between = time.time()
    cluster.feed("acme/b", rows(60))
    cluster.run()
    assert cluster.trained == ["acme/a", "acme/b"] and cluster.run() == []
    with cluster.registry.writing() as session:
        (found,) = nightly_again.backfill(session, between)
        assert found.adapter == "acme/b"
    assert only(cluster.run()).adapter == "acme/b" and cluster.trained == ["acme/a", "acme/b", "acme/b"]


def test_a_first_version_that_is_not_better_is_still_the_champion(cluster: Cluster) -> None:
    cluster.right = lambda model: False
    cluster.feed("acme/a", rows(60))
    held = only(cluster.run())
    assert held.verdict is Verdict.HELD and held.reason.endswith(
        "; as the first version it is the champion all the same"
    )


@pytest.mark.parametrize(("valid", "enough"), [(0, 11), (5, 10)])
def test_little_data_waits_until_there_is_enough(cluster: Cluster, valid: int, enough: int) -> None:
    cluster.feed("acme/a", rows(1), rows(valid, "valid"))
    for _ in range(2):
        waiting = only(cluster.run())
        assert waiting.verdict is Verdict.WAITING and succeeded([waiting]) and cluster.pending() == ["acme/a"]
        assert f"at least {enough}" in waiting.reason and f"add {enough - 1} more" in waiting.reason
    with cluster.registry.reading() as session:
        state = nightly.new_data_state(session, "acme/a", 10)
    assert (state.examples, state.validation_examples, state.enough) == (1, valid, False)
    assert state.outlook == waiting.reason
    cluster.feed("acme/a", rows(enough - 1, "more"))
    first = only(cluster.run())
    if valid:
        assert first.verdict is Verdict.PROMOTED
    else:
        assert first.verdict is Verdict.HELD and "at least 5 held-out examples are needed" in first.reason
    cluster.feed("acme/a", rows(2, "late"))  # with old data, two are enough: one to train on, one to evaluate on
    assert only(cluster.run()).verdict in (Verdict.PROMOTED, Verdict.HELD)


def promoted_thrice(cluster: Cluster, pool: Callable[[JobRecord, Sequence[str]], None] | None = None) -> None:
    """Each new version answers right, and no earlier one does any more; `pool` trains the third."""
    earlier: list[str] = []
    cluster.right = lambda model: "@" in model and not any(each[:12] in model for each in earlier)
    for word in ("one", "two", "three"):
        if word == "three" and pool is not None:
            cluster.pool = lambda job: pool(job, earlier)
        cluster.feed("acme/a", rows(60, word))
        assert only(cluster.run()).verdict is Verdict.PROMOTED
        earlier.append(str(cluster.champion("acme/a")))


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


def test_examples_that_are_all_the_same_wait_for_others(cluster: Cluster) -> None:
    cluster.feed("acme/a", rows(1) * 20)
    waiting = only(cluster.run())
    assert waiting.verdict is Verdict.WAITING and waiting.reason.startswith("1 new example so far")
    question = "Where is the parcel that I ordered three weeks ago and that has still not arrived at my house"
    alike = [{"role": "user", "content": question}, {"role": "assistant", "content": "On its way."}]
    same = [{"messages": [{"role": "user", "content": f"{question}{'?' * count}"}, alike[1]]} for count in range(11)]
    cluster.feed("bolt/b", same)
    _, waiting = cluster.run()
    assert waiting.verdict is Verdict.WAITING and "all alike" in waiting.reason


def test_data_that_is_known_is_skipped(cluster: Cluster) -> None:
    cluster.feed("acme/a", rows(12))
    assert only(cluster.run()).counts == CollectedCounts(train=11, held_out=1)
    cluster.feed("acme/a", rows(12))
    skipped = only(cluster.run())
    assert (skipped.verdict, skipped.reason) == (
        Verdict.SKIPPED,
        "nothing new: 11 known already, 1 equal or similar to held-out examples.",
    )
    assert succeeded([skipped]) and cluster.pending() == [] and cluster.run() == []
    assert cluster.trained == ["acme/a"]


def test_bad_rows_are_quarantined_and_listed(cluster: Cluster) -> None:
    bad = [{"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": ""}]}]
    cluster.feed("acme/a", [*rows(12), *bad])
    outcome = only(cluster.run())
    assert (outcome.stage, outcome.counts.quarantined) == ("promote", 1)
    assert outcome.quarantined == (
        "rows.jsonl, line 13: messages[1].content is empty; write the text, or remove the example.",
    )
    with cluster.registry.reading() as session:
        file = datasets.get(session, outcome.quarantine or "", "acme")
    (found,) = cluster.registry.artifacts.read(file.artifact, "data.jsonl").splitlines()
    assert json.loads(found) == {
        "file": "rows.jsonl",
        "line": 13,
        "field": "messages[1].content",
        "reason": "messages[1].content is empty; write the text, or remove the example.",
        "row": json.dumps(bad[0]),
    }


def test_data_of_a_failed_run_is_not_known_when_it_is_retried(cluster: Cluster) -> None:
    cluster.pool = partial(failing, cluster)
    cluster.feed("acme/a", rows(12))
    assert only(cluster.run()).verdict is Verdict.FAILED
    cluster.pool = cluster.publish
    with cluster.registry.writing() as session:
        nightly.retry(session, "acme/a")
    assert only(cluster.run()).counts.train == 11


def test_data_that_fails_is_set_aside_and_does_not_stop_others(cluster: Cluster) -> None:
    cluster.feed("acme/bad", [*rows(60), *({"prompt": f"Q {i}", "completion": "A"} for i in range(20))])
    cluster.feed("bolt/good", rows(60))
    bad, good = cluster.run()
    assert (bad.verdict, bad.stage, good.verdict) == (Verdict.FAILED, "collect", Verdict.PROMOTED)
    assert "20 of 80 rows are bad, more than 20%" in bad.reason and "loramill nightly retry acme/bad" in bad.reason
    assert not succeeded([bad, good])
    assert summary([bad, good]) == "Nightly run: 1 promoted, 1 failed (acme/bad at collect)."
    assert cluster.set_aside() == {"acme/bad": "collect"} and cluster.run() == []
    with cluster.registry.writing() as session:
        nightly.retry(session, "acme/bad")
        with pytest.raises(NotFound):
            nightly.retry(session, "acme/bad")
    assert cluster.pending() == ["acme/bad"] and only(cluster.run()).verdict is Verdict.FAILED
    with cluster.registry.writing() as session:
        nightly.drop(session, "acme/bad")
        with pytest.raises(NotFound):
            nightly.drop(session, "acme/bad")
    assert cluster.set_aside() == {} and cluster.pending() == []


def test_a_bug_that_one_adapter_triggers_fails_it_alone(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    plan_training = collect.plan_training

    def broken(session, artifacts, name, *rest):
        if name.adapter == "bad":
            raise ZeroDivisionError("division by zero")
        return plan_training(session, artifacts, name, *rest)

    monkeypatch.setattr(collect, "plan_training", broken)
    cluster.feed("acme/bad", rows(60))
    cluster.feed("acme/good", rows(60))
    bad, good = cluster.run()
    assert (bad.verdict, good.verdict) == (Verdict.FAILED, Verdict.PROMOTED)
    assert bad.reason.startswith("collect: ZeroDivisionError: division by zero.")


def test_unreachable_storage_loses_no_data(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    def unavailable(*_):
        raise Unavailable("The store is away; try again.")

    cluster.feed("acme/a", rows(60))
    with monkeypatch.context() as patched:
        patched.setattr(collect, "plan_training", unavailable)
        failed = only(cluster.run())
    assert failed.verdict is Verdict.FAILED and failed.reason.endswith("Its data waits for the next nightly run.")
    assert cluster.pending() == ["acme/a"] and cluster.set_aside() == {}
    assert only(cluster.run()).verdict is Verdict.PROMOTED


def failing(cluster: Cluster, job: JobRecord) -> None:
    leased = cluster.lease()
    with cluster.registry.writing() as session:
        jobs.fail(session, leased.id, leased.attempt, TrainingDiverged("The loss is NaN."), retry=False)


def cancelling(cluster: Cluster, job: JobRecord) -> None:
    with cluster.registry.writing() as session:
        jobs.cancel(session, job.id)


def pausing(cluster: Cluster, job: JobRecord) -> None:
    if job.status == "queued":
        with cluster.registry.writing() as session:
            jobs.pause(session, job.id)


def deleting(cluster: Cluster, job: JobRecord) -> None:
    with cluster.registry.writing() as session:
        session.execute(text("delete from job_events where job = :job"), {"job": job.id})
        session.execute(text("delete from jobs where id = :job"), {"job": job.id})


@pytest.mark.parametrize(
    ("ending", "reason"),
    [
        (failing, "train: The loss is NaN."),
        (cancelling, "was cancelled."),
        (pausing, "is paused; after `loramill jobs resume"),
        (deleting, "There is no fine-tuning job"),
    ],
)
def test_a_job_that_does_not_succeed_fails_its_adapter_alone(
    cluster: Cluster, ending: Callable[[Cluster, JobRecord], None], reason: str
) -> None:
    cluster.feed("acme/bad", rows(60))
    cluster.feed("bolt/good", rows(60))
    cluster.pool = ordered(cluster, ending)
    bad, good = cluster.run()
    assert (bad.verdict, bad.stage, good.verdict) == (Verdict.FAILED, "train", Verdict.PROMOTED)
    assert reason in bad.reason and cluster.set_aside() == {"acme/bad": "train"}
    assert cluster.run() == []


def ordered(cluster: Cluster, ending: Callable[[Cluster, JobRecord], None]) -> Callable[[JobRecord], None]:
    """A pool that ends acme's job in this way, and trains the other tenant's."""

    def pool(job: JobRecord) -> None:
        if job.spec.adapter == "acme/bad":
            ending(cluster, job)
        elif job.status == "queued":
            with cluster.registry.reading() as session:
                others = [each for each in jobs.list_jobs(session, tenant="acme") if each.status == "queued"]
            if not others:
                cluster.publish(job)

    return pool


def test_an_unreachable_gateway_leaves_a_run_that_resumes(cluster: Cluster) -> None:
    cluster.feed("acme/a", rows(60))
    cluster.checks = [NotRunning("Nothing answers at http://127.0.0.1:9: start it with `loramill up`.")]
    with pytest.raises(NotRunning):
        cluster.run()
    with cluster.registry.reading() as session:
        run = nightly.list_runs(session)[0]
    stopped = only(cluster.outcomes(run.id))
    assert run.finished_at is None and stopped.verdict is Verdict.INTERRUPTED and not succeeded([stopped])
    assert (
        stopped.reason.startswith("train: Nothing answers at") and "`loramill nightly run` resumes it" in stopped.reason
    )
    assert only(cluster.run()).verdict is Verdict.PROMOTED and cluster.trained == ["acme/a"]


def test_jobs_continue_while_the_gateway_is_unreachable(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster.feed("acme/a", rows(60))
    cluster.checks = [None, *[Unavailable("The models don't answer yet.")] * 3]
    cluster.pool = lambda job: None if cluster.checks else cluster.publish(job)
    assert only(cluster.run()).verdict is Verdict.PROMOTED
    monkeypatch.setattr(train, "UNREACHABLE_SECONDS", -1.0)
    cluster.feed("acme/a", rows(60, "more"))
    cluster.pool = lambda job: None
    cluster.checks = [None, Unavailable("The models don't answer yet.")]
    with pytest.raises(Unavailable):
        cluster.run()
    cluster.pool = cluster.publish
    assert only(cluster.run()).verdict is not Verdict.FAILED and cluster.trained == ["acme/a", "acme/a"]


def test_a_champion_of_another_base_is_named_and_the_data_waits(cluster: Cluster, base: Base, monkeypatch) -> None:
    cluster.feed("acme/a", rows(60))
    cluster.run()
    cluster.feed("acme/a", rows(60, "more"))
    other = Base("other", base.folder, "0" * 64, base.architecture, base.context_length)
    with monkeypatch.context() as patched:
        patched.setattr(run, "find_base", lambda *_: other)
        failed = only(cluster.run())
    assert (
        failed.verdict is Verdict.FAILED and "another base" in failed.reason and "other (000000000000)" in failed.reason
    )
    assert cluster.pending() == ["acme/a"]
    assert only(cluster.run()).verdict is not Verdict.FAILED


def test_a_base_that_changes_during_a_run_cancels_its_jobs(cluster: Cluster, base: Base, monkeypatch) -> None:
    cluster.feed("acme/a", rows(60))
    cluster.pool = lambda job: None
    cluster.checks = [None, NotRunning("Nothing answers.")]
    with monkeypatch.context() as patched:
        patched.setattr(train, "UNREACHABLE_SECONDS", -1.0)
        with pytest.raises(NotRunning):
            cluster.run()
        other = Base("other", base.folder, "0" * 64, base.architecture, base.context_length)
        patched.setattr(run, "find_base", lambda *_: other)
        failed = only(cluster.run())
    assert failed.verdict is Verdict.FAILED and "The base has changed" in failed.reason
    assert cluster.pending() == ["acme/a"]


def test_a_version_that_is_gone_fails_its_adapter_alone(cluster: Cluster) -> None:
    cluster.feed("acme/bad", rows(60))
    cluster.feed("bolt/good", rows(60))
    cluster.refuse = {"acme/bad": ModelNotFound("The model 'acme/bad' does not exist.", param="model")}
    bad, good = cluster.run()
    assert (bad.verdict, bad.stage, good.verdict) == (Verdict.FAILED, "evaluate", Verdict.PROMOTED)
    assert cluster.set_aside() == {"acme/bad": "evaluate"}


def test_an_adapter_with_a_transient_error_is_evaluated_again_once(cluster: Cluster) -> None:
    cluster.feed("acme/bad", rows(60))
    cluster.feed("bolt/good", rows(60))
    cluster.refuse = {"acme/bad": Unavailable("The adapter can't be read now; try again.")}
    bad, good = cluster.run()
    assert (bad.verdict, bad.stage, good.verdict) == (Verdict.INTERRUPTED, "evaluate", Verdict.PROMOTED)
    bad, good = cluster.run()
    assert (bad.verdict, good.verdict) == (Verdict.FAILED, Verdict.PROMOTED)
    assert sorted(cluster.trained) == ["acme/bad", "bolt/good"], "nothing is trained twice"
    assert cluster.pending() == ["acme/bad"] and cluster.set_aside() == {}


def test_a_held_out_file_that_was_deleted_is_named(cluster: Cluster) -> None:
    cluster.feed("acme/a", rows(60))

    def pool(job: JobRecord) -> None:
        cluster.publish(job)
        with cluster.registry.writing() as session:
            (step,) = [
                step for step in nightly.list_steps(session, nightly.list_runs(session)[0].id) if step.step == "collect"
            ]
            datasets.delete(session, step.result["slices"]["new"])

    cluster.pool = pool
    failed = only(cluster.run())
    assert (failed.verdict, failed.stage) == (Verdict.FAILED, "evaluate") and "There is no file 'file-" in failed.reason


@pytest.mark.parametrize("subject", ["adapter", "tenant"])
def test_an_adapter_deleted_during_the_run_has_a_row(cluster: Cluster, subject: str) -> None:
    cluster.feed("acme/gone", rows(60))
    cluster.feed("bolt/good", rows(60))

    def pool(job: JobRecord) -> None:
        if job.spec.adapter == "acme/gone":
            with cluster.registry.writing() as session:
                if subject == "adapter":
                    deletion.delete_adapter(session, AdapterName.parse("acme/gone"), cancel_jobs=True)
                else:
                    deletion.delete_tenant(session, "acme", cancel_jobs=True)
        else:
            ordered(cluster, deleting)(job)

    cluster.pool = pool
    gone, good = cluster.run()
    assert (gone.verdict, good.verdict) == (Verdict.DELETED, Verdict.PROMOTED)
    assert gone.reason == "The adapter was deleted during the nightly run." and succeeded([gone, good])


def test_a_champion_that_changed_during_the_run_is_not_replaced(cluster: Cluster) -> None:
    for word in ("one", "two"):
        cluster.feed("acme/a", rows(60, word))
        cluster.run()
    cluster.feed("acme/a", rows(60, "three"))

    def pool(job: JobRecord) -> None:
        cluster.publish(job)
        with cluster.registry.writing() as session:
            adapters.promote(session, "acme/a", chosen, "by hand")

    with cluster.registry.reading() as session:
        chosen = next(
            v.id for v in adapters.list_versions(session, "acme/a") if v.id != adapters.get(session, "acme/a").champion
        )
    champion = cluster.champion("acme/a")
    cluster.pool = pool
    cluster.right = lambda model: "@" in model and str(champion)[:12] not in model
    held = only(cluster.run())
    assert held.verdict is Verdict.HELD and "during the run" in held.reason and cluster.champion("acme/a") == chosen


def test_quota_and_refusals_at_submission_fail_one_adapter(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(session, spec, *rest, **options):
        raise InvalidRequest("The rank is too large.")

    cluster.feed("acme/a", rows(60))
    monkeypatch.setattr(jobs, "submit", refused)
    failed = only(cluster.run())
    assert (failed.verdict, failed.stage) == (Verdict.FAILED, "train") and "The rank is too large." in failed.reason


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
