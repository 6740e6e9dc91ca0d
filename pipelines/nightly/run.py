"""The nightly run: for every adapter with new data, collect, train, evaluate, gate, promote.

Each step of each adapter is a row, written in the same transaction as what the step did: a run that was killed resumes
where it was, and no step is done twice. All adapters go through a stage together, so that their jobs train at the same
time and their questions share the engine's batches.

An adapter that fails in a stage leaves the run and stops no other. If the reason passes by itself (an outage, a quota,
another base), the next run collects its data again; other data is set aside until someone retries or drops it, so that
no failure repeats every night.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from sqlalchemy.orm import Session

from loramill.data.examples import Example, read_examples
from loramill.data.tokenizer import ChatTokenizer
from loramill.errors import (
    BaseUnusable,
    Conflict,
    DeadlineExceeded,
    JobCancelled,
    JobError,
    LoramillError,
    NotFound,
    Overloaded,
    QuotaExceeded,
    RateLimited,
    SetupError,
    Unavailable,
)
from loramill.models.catalog import Base, find_base
from loramill.names import SHORT, AdapterName
from loramill.pipelines.nightly.collect import TooLittle, collect
from loramill.pipelines.nightly.evaluate import Answer, Question, questions_of
from loramill.pipelines.nightly.gate import Decision, SliceScores, Thresholds, decide
from loramill.pipelines.nightly.gateway import Gateway, HttpGateway
from loramill.pipelines.nightly.scoring import Score, score
from loramill.registry import Registry, adapters, datasets, evaluations, jobs, nightly
from loramill.settings import Settings
from loramill.types import Alias, JobRecord, JobSpec, JobStatus, NightlyRun, NightlyStep, StepStatus

STAGES = ("collect", "train", "evaluate", "gate", "promote")
#: Failures that pass by themselves: the next run tries again with the same data.
PASSING = (Unavailable, DeadlineExceeded, Overloaded, QuotaExceeded, RateLimited, SetupError, OSError)
#: Seconds for which a run waits for its jobs while the gateway is away.
AWAY_SECONDS = 120.0
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Progress:
    """The progress of a stage: steps of an adapter's job, or answers to the questions of all adapters (None)."""

    stage: str
    adapter: str | None
    done: int
    total: int
    state: str


Report = Callable[[NightlyStep], None]
OnProgress = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class Night:
    """One run with what its stages need."""

    run: NightlyRun
    registry: Registry
    settings: Settings
    base: Base
    report: Report
    gateway: Gateway
    progress: OnProgress = lambda progress: None

    def done(self, stage: str) -> dict[str, dict[str, Any]]:
        """Results of a finished stage, by adapter."""
        return {step.adapter: step.result for step in self.steps(stage) if step.status is StepStatus.DONE}

    def todo(self, stage: str) -> list[str]:
        """Adapters that finished the stage before and not this one, nor failed in it."""
        before = STAGES[STAGES.index(stage) - 1]
        over = {step.adapter for step in self.steps(stage) if step.status is not StepStatus.PENDING}
        return [adapter for adapter in self.done(before) if adapter not in over]

    def begun(self, stage: str) -> dict[str, dict[str, Any]]:
        """What a stage wrote down for adapters that are still in it."""
        return {step.adapter: step.result for step in self.steps(stage) if step.status is StepStatus.PENDING}

    def steps(self, stage: str | None = None) -> list[NightlyStep]:
        """The recorded steps of a stage, or of all stages."""
        with self.registry.reading() as session:
            return [step for step in nightly.steps(session, self.run.id) if stage in (None, step.step)]

    def note(self, session: Session, adapter: str, stage: str, result: dict[str, Any]) -> NightlyStep:
        """Records the state of a step that isn't finished."""
        return nightly.record(session, self.run.id, adapter, stage, StepStatus.PENDING, result)

    def finish(self, session: Session, adapter: str, stage: str, result: dict[str, Any]) -> None:
        """Records the end of a step in the transaction of its work, and reports it."""
        self.report(nightly.record(session, self.run.id, adapter, stage, StepStatus.DONE, result))

    def attempt(self, adapter: str, stage: str, work: Callable[[], None]) -> bool:
        """Does a step's work; any failure is recorded, and affects no other adapter."""
        try:
            work()
        except LoramillError as error:
            self.fail(adapter, stage, error)
        except Exception as error:  # a defect that one adapter's data meets must not stop the others
            log.exception("%s of %s failed", stage, adapter)
            self.fail(adapter, stage, error)
        else:
            return True
        return False

    def fail(self, adapter: str, stage: str, error: Exception) -> None:
        """Records why a step failed, and releases the adapter's data or sets it aside."""
        message = error.message if isinstance(error, LoramillError) else f"{type(error).__name__}: {error}"
        passing = isinstance(error, PASSING)
        with self.registry.writing() as session:
            if not _exists(session, adapter):
                return  # `missing` reports it at the end of the run
            if passing:
                nightly.release(session, self.run.id, adapter)
            elif stage == "collect":  # its own transaction was undone
                nightly.collect(session, self.run.id, adapter)
            before = {step.adapter: step.result for step in nightly.steps(session, self.run.id) if step.step == stage}
            result = before.get(adapter, {}) | {"error": message, "data": "waiting" if passing else "set aside"}
            self.report(nightly.record(session, self.run.id, adapter, stage, StepStatus.FAILED, result))

    def interrupt(self, error: LoramillError) -> None:
        """Records for every adapter that isn't finished why the run stopped; the next run resumes it."""
        steps = self.steps()
        over = {step.adapter for step in steps if step.step == STAGES[-1] or step.status is StepStatus.FAILED}
        done = {(step.adapter, step.step) for step in steps if step.status is StepStatus.DONE}
        for adapter in self.done("collect").keys() - over:
            stage = next(stage for stage in STAGES if (adapter, stage) not in done)
            noted = self.begun(stage).get(adapter, {})
            with self.registry.writing() as session:
                self.note(session, adapter, stage, noted | {"error": error.message})


def run_night(
    registry: Registry,
    settings: Settings,
    *,
    report: Report = lambda step: None,
    progress: OnProgress = lambda progress: None,
    gateway: Gateway | None = None,
) -> NightlyRun:
    """Runs all stages for every adapter with new data, or resumes a run that was interrupted.

    Args:
        report: called with each step that ends, and at the end for each adapter that was deleted meanwhile.
        progress: called while jobs train and questions are answered.
        gateway: None: the one of the settings.

    Raises:
        NotRunning, Unavailable: the gateway or the database is away; the next run resumes this one.
        BaseUnusable: the base can't be found.
    """
    base = find_base(settings.base, settings.cache, settings.quantization)
    with registry.writing() as session:
        run = nightly.open_run(session)
        pending = {waiting.adapter for waiting in nightly.pending(session)}
    night = Night(run, registry, settings, base, report, gateway or HttpGateway(settings), progress)
    seen = pending | {step.adapter for step in night.steps()}
    collect_all(night)
    try:
        for stage in (train_all, evaluate_all, gate_all, promote_all):
            stage(night)
    except (Unavailable, SetupError) as error:
        night.interrupt(error)
        raise
    for step in missing(night, seen):
        report(step)
    if night.begun("evaluate"):  # the next run asks for the missing answers again
        return run
    with registry.writing() as session:
        return nightly.finish(session, run.id)


def missing(night: Night, seen: Collection[str]) -> list[NightlyStep]:
    """A step for each adapter that was deleted during the run, together with its recorded steps."""
    with night.registry.reading() as session:
        gone = [adapter for adapter in sorted(seen) if not _exists(session, adapter)]
    result = {"error": "The adapter was deleted during the nightly run.", "deleted": True}
    return [
        NightlyStep(run=night.run.id, adapter=adapter, step="collect", status=StepStatus.FAILED, result=result)
        for adapter in gone
    ]


def collect_all(night: Night) -> None:
    """Freezes each adapter's new data into datasets for this run."""
    with night.registry.reading() as session:
        pending = [waiting.adapter for waiting in nightly.pending(session)]
    over = {step.adapter for step in night.steps() if step.status is not StepStatus.PENDING}
    for adapter in pending:
        if adapter not in over:  # data that came later is for the next run
            night.attempt(adapter, "collect", partial(_collect, night, adapter))


def _collect(night: Night, adapter: str) -> None:
    name = AdapterName.parse(adapter)
    with night.registry.writing() as session:
        if new_data := nightly.collect(session, night.run.id, name):
            minimum = night.settings.jobs.min_examples
            plan = collect(session, night.registry.artifacts, name, new_data, night.base, minimum)
            if isinstance(plan, TooLittle):
                nightly.release(session, night.run.id, name)
                night.report(night.note(session, adapter, "collect", {"waiting": plan.reason}))
            else:
                night.finish(session, adapter, "collect", plan)


def train_all(night: Night, *, poll_seconds: float = 0.5) -> None:
    """Submits a job for each adapter, then waits until all have ended.

    Raises:
        NotRunning, Unavailable: the gateway is away, for `AWAY_SECONDS` if jobs train already.
    """
    waiting = night.todo("train")
    if not waiting:
        return
    night.gateway.check()
    begun = night.begun("train")
    for adapter in waiting:
        if "job" not in begun.get(adapter, {}):
            night.attempt(adapter, "train", partial(_submit, night, adapter))
    open_jobs = {adapter: result["job"] for adapter, result in night.begun("train").items() if "job" in result}
    away: float | None = None
    while open_jobs:
        try:
            night.gateway.check()
            found = _look(night, open_jobs)
        except (SetupError, Unavailable):
            away = away or time.monotonic()
            if time.monotonic() - away > AWAY_SECONDS:
                raise
        else:
            away = None
            for adapter, job in found.items():
                if not night.attempt(adapter, "train", partial(_follow, night, adapter, job)) or job.status.final:
                    del open_jobs[adapter]
            # A job that someone paused may stay so for days; the others don't wait for it.
            if all(found[adapter].status is JobStatus.PAUSED for adapter in open_jobs):
                for adapter, job_id in open_jobs.items():
                    night.fail(adapter, "train", JobError(_paused(job_id)))
                return
        if open_jobs:
            time.sleep(poll_seconds)


def _submit(night: Night, adapter: str) -> None:
    # With the job in the step's own transaction, a run that is killed here has neither or both.
    with night.registry.writing() as session:
        spec = JobSpec.model_validate(night.done("collect")[adapter]["spec"])
        job = jobs.submit(session, spec, {"nightly_run": night.run.id})
        night.note(session, adapter, "train", {"job": job.id})


def _look(night: Night, open_jobs: dict[str, str]) -> dict[str, JobRecord]:
    """The adapters' jobs; one that was deleted fails its adapter, and is removed from `open_jobs`."""
    found = {}
    for adapter, job_id in list(open_jobs.items()):
        try:
            with night.registry.reading() as session:
                found[adapter] = jobs.get(session, job_id)
        except NotFound as error:
            night.fail(adapter, "train", error)
            del open_jobs[adapter]
    return found


def _follow(night: Night, adapter: str, job: JobRecord) -> None:
    """Finishes the step of an adapter whose job has succeeded; raises if the job never will."""
    night.progress(Progress("train", adapter, job.step, job.spec.steps, job.status))
    if job.status is JobStatus.SUCCEEDED:
        with night.registry.writing() as session:
            night.finish(session, adapter, "train", {"job": job.id, "version": job.version, "error": None})
    elif job.status is JobStatus.CANCELLED:
        raise JobCancelled(f"The job {job.id} was cancelled.")
    elif job.status.final:
        raise JobError(job.error_message or f"The job {job.id} failed.")
    elif job.status is JobStatus.QUEUED and job.spec.base != night.base.fingerprint:
        with night.registry.writing() as session:
            jobs.cancel(session, job.id)
        raise BaseUnusable(
            f"The base has changed since the job {job.id} was submitted, so that it can't run; it was cancelled."
        )


def _paused(job: str) -> str:
    return (
        f"The job {job} is paused; after `loramill jobs resume {job}` its version becomes the challenger, which "
        "`loramill promote` can promote."
    )


def evaluate_all(night: Night) -> None:
    """Scores base, champion and challenger of every adapter on its held-out slices, all questions mixed.

    Raises:
        NotRunning, Unavailable: the gateway is away.
    """
    exams: dict[str, Exam] = {}
    for adapter in night.todo("evaluate"):
        night.attempt(adapter, "evaluate", partial(_prepare, night, adapter, exams))
    if not exams:
        return
    tokenizer = ChatTokenizer.load(night.base.folder)
    questions: list[Question] = []
    for exam in exams.values():
        for part in exam.parts:
            questions += questions_of(part.model, part.examples, tokenizer)

    def report(done: int) -> None:
        night.progress(Progress("evaluate", None, done, len(questions), "answers"))

    report(0)
    answers = iter(night.gateway.ask(questions, report) if questions else ())
    given = {
        adapter: [[next(answers) for _ in part.examples] for part in exam.parts] for adapter, exam in exams.items()
    }
    for adapter, exam in exams.items():
        night.attempt(adapter, "evaluate", partial(_mark, night, adapter, exam, given[adapter]))


@dataclass(frozen=True, slots=True)
class Part:
    """The questions of one slice to one candidate; `version` is None for the base."""

    slice: str
    dataset: str
    role: str
    model: str
    version: str | None
    examples: tuple[Example, ...]


@dataclass(frozen=True, slots=True)
class Exam:
    """All questions to one adapter's candidates."""

    parts: tuple[Part, ...]


def _prepare(night: Night, adapter: str, exams: dict[str, Exam]) -> None:
    exams[adapter] = exam_of(night, adapter)


def exam_of(night: Night, adapter: str) -> Exam:
    """The questions to an adapter's base, champion and challenger: all slices to each.

    Raises:
        NotFound: the adapter, a version or a slice was deleted.
    """
    plan, trained = night.done("collect")[adapter], night.done("train")[adapter]
    versions = {"base": None, "champion": plan["champion"], "challenger": trained["version"]}
    models = candidates(night, adapter, plan["champion"], trained["version"])
    return Exam(
        tuple(
            Part(part, dataset, role, model, versions[role], examples)
            for part, dataset in plan["slices"].items()
            for examples in [held_out(night, dataset)]
            for role, model in models.items()
        )
    )


def _mark(night: Night, adapter: str, exam: Exam, given: list[list[Answer | LoramillError]]) -> None:
    """Records an adapter's scores; if answers are missing, raises why, or records it for the next run."""
    refused = [answer for answers in given for answer in answers if isinstance(answer, LoramillError)]
    texts = [[answer.text for answer in answers if isinstance(answer, Answer)] for answers in given]
    if refused:
        first_time = "error" not in night.begun("evaluate").get(adapter, {})
        if not first_time or not isinstance(refused[0], PASSING):
            raise refused[0]
        with night.registry.writing() as session:
            night.report(night.note(session, adapter, "evaluate", {"error": refused[0].message}))
        return
    scores: dict[str, dict[str, dict[str, Any]]] = {}
    with night.registry.writing() as session:
        for part, answers in zip(exam.parts, texts, strict=True):
            result = score(answers, [example.completion for example in part.examples])
            scores.setdefault(part.slice, {})[part.role] = asdict(result)
            evaluations.add(
                session,
                adapter,
                version=part.version,
                dataset=part.dataset,
                slice=part.slice,
                examples=result.examples,
                metrics={"exact_match": result.exact_match, "token_f1": result.token_f1},
            )
        night.finish(session, adapter, "evaluate", scores)


def candidates(night: Night, adapter: str, champion: str | None, challenger: str) -> dict[str, str]:
    """Model names on the wire by role; there is no champion before the first promotion."""
    name = AdapterName.parse(adapter)
    found = {"base": night.base.name, "challenger": name.at(challenger)}
    return found | ({"champion": name.at(champion)} if champion else {})


def held_out(night: Night, dataset: str) -> tuple[Example, ...]:
    """The examples of a dataset."""
    with night.registry.reading() as session:
        found = datasets.get(session, dataset)
    return read_examples(night.registry.artifacts.read(found.artifact, "data.jsonl"), found.filename).examples


def gate_all(night: Night) -> None:
    """Decides about each challenger."""
    for adapter in night.todo("gate"):
        night.attempt(adapter, "gate", partial(_gate, night, adapter))


def _gate(night: Night, adapter: str) -> None:
    slices = [slice_scores(part, roles) for part, roles in night.done("evaluate")[adapter].items()]
    with night.registry.writing() as session:
        night.finish(session, adapter, "gate", asdict(decide(slices, Thresholds())))


def slice_scores(part: str, roles: dict[str, dict[str, Any]]) -> SliceScores:
    """A recorded evaluation as the gate takes it."""
    champion = Score(**roles["champion"]) if "champion" in roles else None
    return SliceScores(part, Score(**roles["base"]), champion, Score(**roles["challenger"]))


def promote_all(night: Night) -> None:
    """Carries the decisions out: an alias moves, or nothing does."""
    for adapter in night.todo("promote"):
        night.attempt(adapter, "promote", partial(_promote, night, adapter))


def _promote(night: Night, adapter: str) -> None:
    decision, version = Decision(**night.done("gate")[adapter]), night.done("train")[adapter]["version"]
    collected = night.done("collect").get(adapter)
    name = AdapterName.parse(adapter)
    with night.registry.writing() as session:
        reason = f"nightly run {night.run.id}: {decision.reason}"
        champion = adapters.get(session, name).champion
        held = decision
        if decision.promote and collected and champion not in (collected["champion"], version):
            held = Decision(False, f"its champion became {champion and champion[:SHORT]} during the run; run it again")
        elif decision.promote:
            try:
                adapters.promote(session, name, version, reason)
            except Conflict as error:  # its owner has pinned the champion
                held = Decision(False, error.message)
        elif champion == version:
            held = Decision(False, f"{decision.reason}; as the first version it answers all the same")
        if held is not decision:
            night.finish(session, adapter, "gate", asdict(held))
        if not held.promote:
            adapters.move(session, name, Alias.CHALLENGER, None, f"nightly run {night.run.id}: {held.reason}")
        champion = adapters.get(session, name).champion
        night.finish(session, adapter, "promote", {"promoted": held.promote, "champion": champion})


def _exists(session: Session, adapter: str) -> bool:
    try:
        adapters.get(session, adapter)
    except NotFound:
        return False
    return True
