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
from loramill.names import SHORT_HASH_LENGTH, AdapterName
from loramill.pipelines.nightly.collect import InsufficientData, collect
from loramill.pipelines.nightly.evaluate import EvalAnswer, EvalQuestion, build_questions
from loramill.pipelines.nightly.gate import GateDecision, SliceScores, Thresholds, decide
from loramill.pipelines.nightly.gateway import EvalGateway, HttpGateway
from loramill.pipelines.nightly.scoring import Score, score
from loramill.registry import Registry, adapters, datasets, evaluations, jobs, nightly
from loramill.settings import Settings
from loramill.types import Alias, JobRecord, JobSpec, JobStatus, NightlyRun, NightlyStep, StepStatus

STAGES = ("collect", "train", "evaluate", "gate", "promote")
#: Failures that pass by themselves: the next run tries again with the same data.
TRANSIENT_ERRORS = (Unavailable, DeadlineExceeded, Overloaded, QuotaExceeded, RateLimited, SetupError, OSError)
#: Seconds for which a run waits for its jobs while the gateway is away.
UNREACHABLE_SECONDS = 120.0
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class NightlyProgress:
    """The progress of a stage: steps of an adapter's job, or answers to the questions of all adapters (None)."""

    stage: str
    adapter: str | None
    done: int
    total: int
    state: str


Report = Callable[[NightlyStep], None]
OnProgress = Callable[[NightlyProgress], None]


@dataclass(frozen=True, slots=True)
class NightlyContext:
    """One run with what its stages need."""

    run: NightlyRun
    registry: Registry
    settings: Settings
    base: Base
    report: Report
    gateway: EvalGateway
    progress: OnProgress = lambda progress: None

    def done(self, stage: str) -> dict[str, dict[str, Any]]:
        """Results of a finished stage, by adapter."""
        return {step.adapter: step.result for step in self.steps(stage) if step.status is StepStatus.DONE}

    def remaining(self, stage: str) -> list[str]:
        """Adapters that finished the stage before and not this one, nor failed in it."""
        before = STAGES[STAGES.index(stage) - 1]
        over = {step.adapter for step in self.steps(stage) if step.status is not StepStatus.PENDING}
        return [adapter for adapter in self.done(before) if adapter not in over]

    def in_progress(self, stage: str) -> dict[str, dict[str, Any]]:
        """What a stage wrote down for adapters that are still in it."""
        return {step.adapter: step.result for step in self.steps(stage) if step.status is StepStatus.PENDING}

    def steps(self, stage: str | None = None) -> list[NightlyStep]:
        """The recorded steps of a stage, or of all stages."""
        with self.registry.reading() as session:
            return [step for step in nightly.list_steps(session, self.run.id) if stage in (None, step.step)]

    def record_pending(self, session: Session, adapter: str, stage: str, result: dict[str, Any]) -> NightlyStep:
        """Records the state of a step that isn't finished."""
        return nightly.record_step(session, self.run.id, adapter, stage, StepStatus.PENDING, result)

    def finish(self, session: Session, adapter: str, stage: str, result: dict[str, Any]) -> None:
        """Records the end of a step in the transaction of its work, and reports it."""
        self.report(nightly.record_step(session, self.run.id, adapter, stage, StepStatus.DONE, result))

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
        passing = isinstance(error, TRANSIENT_ERRORS)
        with self.registry.writing() as session:
            if not _exists(session, adapter):
                return  # `missing` reports it at the end of the run
            if passing:
                nightly.release(session, self.run.id, adapter)
            elif stage == "collect":  # its own transaction was undone
                nightly.collect(session, self.run.id, adapter)
            before = {
                step.adapter: step.result for step in nightly.list_steps(session, self.run.id) if step.step == stage
            }
            result = before.get(adapter, {}) | {"error": message, "data": "waiting" if passing else "set aside"}
            self.report(nightly.record_step(session, self.run.id, adapter, stage, StepStatus.FAILED, result))

    def interrupt(self, error: LoramillError) -> None:
        """Records for every adapter that isn't finished why the run stopped; the next run resumes it."""
        steps = self.steps()
        over = {step.adapter for step in steps if step.step == STAGES[-1] or step.status is StepStatus.FAILED}
        done = {(step.adapter, step.step) for step in steps if step.status is StepStatus.DONE}
        for adapter in self.done("collect").keys() - over:
            stage = next(stage for stage in STAGES if (adapter, stage) not in done)
            noted = self.in_progress(stage).get(adapter, {})
            with self.registry.writing() as session:
                self.record_pending(session, adapter, stage, noted | {"error": error.message})


def run_nightly(
    registry: Registry,
    settings: Settings,
    *,
    report: Report = lambda step: None,
    progress: OnProgress = lambda progress: None,
    gateway: EvalGateway | None = None,
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
        pending = {waiting.adapter for waiting in nightly.pending_data(session)}
    night = NightlyContext(run, registry, settings, base, report, gateway or HttpGateway(settings), progress)
    seen = pending | {step.adapter for step in night.steps()}
    collect_all(night)
    try:
        for stage in (train_all, evaluate_all, gate_all, promote_all):
            stage(night)
    except (Unavailable, SetupError) as error:
        night.interrupt(error)
        raise
    for step in deleted_adapters(night, seen):
        report(step)
    if night.in_progress("evaluate"):  # the next run asks for the missing answers again
        return run
    with registry.writing() as session:
        return nightly.finish_run(session, run.id)


def deleted_adapters(context: NightlyContext, seen: Collection[str]) -> list[NightlyStep]:
    """A step for each adapter that was deleted during the run, together with its recorded steps."""
    with context.registry.reading() as session:
        gone = [adapter for adapter in sorted(seen) if not _exists(session, adapter)]
    result = {"error": "The adapter was deleted during the nightly run.", "deleted": True}
    return [
        NightlyStep(run=context.run.id, adapter=adapter, step="collect", status=StepStatus.FAILED, result=result)
        for adapter in gone
    ]


def collect_all(context: NightlyContext) -> None:
    """Freezes each adapter's new data into datasets for this run."""
    with context.registry.reading() as session:
        pending = [waiting.adapter for waiting in nightly.pending_data(session)]
    over = {step.adapter for step in context.steps() if step.status is not StepStatus.PENDING}
    for adapter in pending:
        if adapter not in over:  # data that came later is for the next run
            context.attempt(adapter, "collect", partial(_collect, context, adapter))


def _collect(context: NightlyContext, adapter: str) -> None:
    name = AdapterName.parse(adapter)
    with context.registry.writing() as session:
        if new_data := nightly.collect(session, context.run.id, name):
            minimum = context.settings.jobs.min_examples
            plan = collect(session, context.registry.artifacts, name, new_data, context.base, minimum)
            if isinstance(plan, InsufficientData):
                nightly.release(session, context.run.id, name)
                context.report(context.record_pending(session, adapter, "collect", {"waiting": plan.reason}))
            else:
                context.finish(session, adapter, "collect", plan)


def train_all(context: NightlyContext, *, poll_seconds: float = 0.5) -> None:
    """Submits a job for each adapter, then waits until all have ended.

    Raises:
        NotRunning, Unavailable: the gateway is away, for `AWAY_SECONDS` if jobs train already.
    """
    waiting = context.remaining("train")
    if not waiting:
        return
    context.gateway.check()
    begun = context.in_progress("train")
    for adapter in waiting:
        if "job" not in begun.get(adapter, {}):
            context.attempt(adapter, "train", partial(_submit, context, adapter))
    open_jobs = {adapter: result["job"] for adapter, result in context.in_progress("train").items() if "job" in result}
    away: float | None = None
    while open_jobs:
        try:
            context.gateway.check()
            found = _poll_jobs(context, open_jobs)
        except (SetupError, Unavailable):
            away = away or time.monotonic()
            if time.monotonic() - away > UNREACHABLE_SECONDS:
                raise
        else:
            away = None
            for adapter, job in found.items():
                if (
                    not context.attempt(adapter, "train", partial(_check_job, context, adapter, job))
                    or job.status.final
                ):
                    del open_jobs[adapter]
            # A job that someone paused may stay so for days; the others don't wait for it.
            if all(found[adapter].status is JobStatus.PAUSED for adapter in open_jobs):
                for adapter, job_id in open_jobs.items():
                    context.fail(adapter, "train", JobError(_paused(job_id)))
                return
        if open_jobs:
            time.sleep(poll_seconds)


def _submit(context: NightlyContext, adapter: str) -> None:
    # With the job in the step's own transaction, a run that is killed here has neither or both.
    with context.registry.writing() as session:
        spec = JobSpec.model_validate(context.done("collect")[adapter]["spec"])
        job = jobs.submit(session, spec, {"nightly_run": context.run.id})
        context.record_pending(session, adapter, "train", {"job": job.id})


def _poll_jobs(context: NightlyContext, open_jobs: dict[str, str]) -> dict[str, JobRecord]:
    """The adapters' jobs; one that was deleted fails its adapter, and is removed from `open_jobs`."""
    found = {}
    for adapter, job_id in list(open_jobs.items()):
        try:
            with context.registry.reading() as session:
                found[adapter] = jobs.get(session, job_id)
        except NotFound as error:
            context.fail(adapter, "train", error)
            del open_jobs[adapter]
    return found


def _check_job(context: NightlyContext, adapter: str, job: JobRecord) -> None:
    """Finishes the step of an adapter whose job has succeeded; raises if the job never will."""
    context.progress(NightlyProgress("train", adapter, job.step, job.spec.steps, job.status))
    if job.status is JobStatus.SUCCEEDED:
        with context.registry.writing() as session:
            context.finish(session, adapter, "train", {"job": job.id, "version": job.version, "error": None})
    elif job.status is JobStatus.CANCELLED:
        raise JobCancelled(f"The job {job.id} was cancelled.")
    elif job.status.final:
        raise JobError(job.error_message or f"The job {job.id} failed.")
    elif job.status is JobStatus.QUEUED and job.spec.base != context.base.fingerprint:
        with context.registry.writing() as session:
            jobs.cancel(session, job.id)
        raise BaseUnusable(
            f"The base has changed since the job {job.id} was submitted, so that it can't run; it was cancelled."
        )


def _paused(job: str) -> str:
    return (
        f"The job {job} is paused; after `loramill jobs resume {job}` its version becomes the challenger, which "
        "`loramill promote` can promote."
    )


def evaluate_all(context: NightlyContext) -> None:
    """Scores base, champion and challenger of every adapter on its held-out slices, all questions mixed.

    Raises:
        NotRunning, Unavailable: the gateway is away.
    """
    exams: dict[str, Exam] = {}
    for adapter in context.remaining("evaluate"):
        context.attempt(adapter, "evaluate", partial(_prepare, context, adapter, exams))
    if not exams:
        return
    tokenizer = ChatTokenizer.load(context.base.folder)
    questions: list[EvalQuestion] = []
    for exam in exams.values():
        for part in exam.parts:
            questions += build_questions(part.model, part.examples, tokenizer)

    def report(done: int) -> None:
        context.progress(NightlyProgress("evaluate", None, done, len(questions), "answers"))

    report(0)
    answers = iter(context.gateway.answer_all(questions, report) if questions else ())
    given = {
        adapter: [[next(answers) for _ in part.examples] for part in exam.parts] for adapter, exam in exams.items()
    }
    for adapter, exam in exams.items():
        context.attempt(adapter, "evaluate", partial(_record_scores, context, adapter, exam, given[adapter]))


@dataclass(frozen=True, slots=True)
class EvalPart:
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

    parts: tuple[EvalPart, ...]


def _prepare(context: NightlyContext, adapter: str, exams: dict[str, Exam]) -> None:
    exams[adapter] = exam_of(context, adapter)


def exam_of(context: NightlyContext, adapter: str) -> Exam:
    """The questions to an adapter's base, champion and challenger: all slices to each.

    Raises:
        NotFound: the adapter, a version or a slice was deleted.
    """
    plan, trained = context.done("collect")[adapter], context.done("train")[adapter]
    versions = {"base": None, "champion": plan["champion"], "challenger": trained["version"]}
    models = model_names(context, adapter, plan["champion"], trained["version"])
    return Exam(
        tuple(
            EvalPart(part, dataset, role, model, versions[role], examples)
            for part, dataset in plan["slices"].items()
            for examples in [load_examples(context, dataset)]
            for role, model in models.items()
        )
    )


def _record_scores(
    context: NightlyContext, adapter: str, exam: Exam, given: list[list[EvalAnswer | LoramillError]]
) -> None:
    """Records an adapter's scores; if answers are missing, raises why, or records it for the next run."""
    refused = [answer for answers in given for answer in answers if isinstance(answer, LoramillError)]
    texts = [[answer.text for answer in answers if isinstance(answer, EvalAnswer)] for answers in given]
    if refused:
        first_time = "error" not in context.in_progress("evaluate").get(adapter, {})
        if not first_time or not isinstance(refused[0], TRANSIENT_ERRORS):
            raise refused[0]
        with context.registry.writing() as session:
            context.report(context.record_pending(session, adapter, "evaluate", {"error": refused[0].message}))
        return
    scores: dict[str, dict[str, dict[str, Any]]] = {}
    with context.registry.writing() as session:
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
        context.finish(session, adapter, "evaluate", scores)


def model_names(context: NightlyContext, adapter: str, champion: str | None, challenger: str) -> dict[str, str]:
    """Model names on the wire by role; there is no champion before the first promotion."""
    name = AdapterName.parse(adapter)
    found = {"base": context.base.name, "challenger": name.at(challenger)}
    return found | ({"champion": name.at(champion)} if champion else {})


def load_examples(context: NightlyContext, dataset: str) -> tuple[Example, ...]:
    """The examples of a dataset."""
    with context.registry.reading() as session:
        found = datasets.get(session, dataset)
    return read_examples(context.registry.artifacts.read(found.artifact, "data.jsonl"), found.filename).examples


def gate_all(context: NightlyContext) -> None:
    """Decides about each challenger."""
    for adapter in context.remaining("gate"):
        context.attempt(adapter, "gate", partial(_gate, context, adapter))


def _gate(context: NightlyContext, adapter: str) -> None:
    slices = [slice_scores(part, roles) for part, roles in context.done("evaluate")[adapter].items()]
    with context.registry.writing() as session:
        context.finish(session, adapter, "gate", asdict(decide(slices, Thresholds())))


def slice_scores(part: str, roles: dict[str, dict[str, Any]]) -> SliceScores:
    """A recorded evaluation as the gate takes it."""
    champion = Score(**roles["champion"]) if "champion" in roles else None
    return SliceScores(part, Score(**roles["base"]), champion, Score(**roles["challenger"]))


def promote_all(context: NightlyContext) -> None:
    """Carries the decisions out: an alias moves, or nothing does."""
    for adapter in context.remaining("promote"):
        context.attempt(adapter, "promote", partial(_promote, context, adapter))


def _promote(context: NightlyContext, adapter: str) -> None:
    decision, version = GateDecision(**context.done("gate")[adapter]), context.done("train")[adapter]["version"]
    collected = context.done("collect").get(adapter)
    name = AdapterName.parse(adapter)
    with context.registry.writing() as session:
        reason = f"nightly run {context.run.id}: {decision.reason}"
        champion = adapters.get(session, name).champion
        held = decision
        if decision.promote and collected and champion not in (collected["champion"], version):
            held = GateDecision(
                False, f"its champion became {champion and champion[:SHORT_HASH_LENGTH]} during the run; run it again"
            )
        elif decision.promote:
            try:
                adapters.promote(session, name, version, reason)
            except Conflict as error:  # its owner has pinned the champion
                held = GateDecision(False, error.message)
        elif champion == version:
            held = GateDecision(False, f"{decision.reason}; as the first version it answers all the same")
        if held is not decision:
            context.finish(session, adapter, "gate", asdict(held))
        if not held.promote:
            adapters.move(session, name, Alias.CHALLENGER, None, f"nightly run {context.run.id}: {held.reason}")
        champion = adapters.get(session, name).champion
        context.finish(session, adapter, "promote", {"promoted": held.promote, "champion": champion})


def _exists(session: Session, adapter: str) -> bool:
    try:
        adapters.get(session, adapter)
    except NotFound:
        return False
    return True
