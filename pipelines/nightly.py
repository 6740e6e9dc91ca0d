"""The night: for every adapter with new data, collect, train, evaluate, gate, promote.

Each step of each adapter is a row, written in the same transaction as what the step did: a night
that was killed goes on where it was, and no step is done twice. All adapters go through a stage
together, so that their jobs train at the same time and their questions share the engine's batches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from openai import AsyncOpenAI
from sqlalchemy.orm import Session

from loramill.bases import Base, find_base
from loramill.chat import ChatTokenizer
from loramill.dataset import Example, read_examples
from loramill.errors import Conflict, LoramillError
from loramill.names import AdapterName
from loramill.pipelines.collect import collect
from loramill.pipelines.evaluate import ask_all, questions_of
from loramill.pipelines.gate import Decision, SliceScores, Thresholds, decide
from loramill.pipelines.scoring import Score, score
from loramill.registry import Registry, adapters, datasets, evaluations, jobs, nightly
from loramill.settings import Settings
from loramill.types import Alias, JobSpec, JobStatus, NightlyRun, NightlyStep, StepStatus

STAGES = ("collect", "train", "evaluate", "gate", "promote")
Report = Callable[[NightlyStep], None]


@dataclass(frozen=True, slots=True)
class Night:
    """One run with what its stages need."""

    run: NightlyRun
    registry: Registry
    settings: Settings
    base: Base
    report: Report

    def done(self, stage: str) -> dict[str, dict[str, Any]]:
        """Results of a finished stage, by adapter."""
        return {step.adapter: step.result for step in self._steps(stage) if step.status is StepStatus.DONE}

    def todo(self, stage: str) -> list[str]:
        """Adapters that finished the stage before and not this one, nor failed in it."""
        before = STAGES[STAGES.index(stage) - 1]
        over = {step.adapter for step in self._steps(stage) if step.status is not StepStatus.PENDING}
        return [adapter for adapter in self.done(before) if adapter not in over]

    def begun(self, stage: str) -> dict[str, dict[str, Any]]:
        """What a stage wrote down for adapters that are still in it."""
        return {step.adapter: step.result for step in self._steps(stage) if step.status is StepStatus.PENDING}

    def finish(
        self, session: Session, adapter: str, stage: str, result: dict[str, Any], *, failed: bool = False
    ) -> None:
        """Records the end of a step in the transaction of its work, and reports it."""
        status = StepStatus.FAILED if failed else StepStatus.DONE
        self.report(nightly.record(session, self.run.id, adapter, stage, status, result))

    def _steps(self, stage: str) -> list[NightlyStep]:
        with self.registry.reading() as session:
            return [step for step in nightly.steps(session, self.run.id) if step.step == stage]


def run_night(registry: Registry, settings: Settings, *, report: Report = lambda step: None) -> NightlyRun:
    """Runs the night, or goes on with one that was interrupted; `report` hears each step that ends.

    Raises:
        openai.OpenAIError: the gateway doesn't answer, so nothing could be evaluated.
        LoramillError: a stage failed as a whole; the next run goes on from there.
    """
    with registry.writing() as session:
        run = nightly.open_run(session)
    night = Night(run, registry, settings, find_base(settings.base, settings.cache, settings.quantization), report)
    collect_all(night)
    train_all(night)
    evaluate_all(night)
    gate_all(night)
    promote_all(night)
    with registry.writing() as session:
        return nightly.finish(session, run.id)


def collect_all(night: Night) -> None:
    """Freezes each adapter's new data into datasets for this night."""
    with night.registry.reading() as session:
        pending = [waiting.adapter for waiting in nightly.pending(session)]
    collected = night.done("collect")  # what came in since then is the next night's
    for adapter in pending:
        if adapter in collected:
            continue
        name = AdapterName.parse(adapter)
        try:
            with night.registry.writing() as session:
                if new_data := nightly.collect(session, night.run.id, name):
                    plan = collect(session, night.registry.artifacts, name, new_data, night.base)
                    night.finish(session, adapter, "collect", plan)
        except LoramillError as error:  # one adapter's bad data must not cost the others their night
            with night.registry.writing() as session:
                night.finish(session, adapter, "collect", {"error": error.message}, failed=True)


def train_all(night: Night, *, poll_seconds: float = 0.5) -> None:
    """Submits a job for each adapter, then waits until all have ended."""
    plans = night.done("collect")
    for adapter in set(night.todo("train")) - set(night.begun("train")):
        # With the job in the step's own transaction, a night that is killed here has neither or both.
        with night.registry.writing() as session:
            job = jobs.submit(session, JobSpec.model_validate(plans[adapter]["spec"]), {"nightly_run": night.run.id})
            nightly.record(session, night.run.id, adapter, "train", StepStatus.PENDING, {"job": job.id})
    open_jobs = {adapter: begun["job"] for adapter, begun in night.begun("train").items()}
    while open_jobs:
        for adapter, job_id in list(open_jobs.items()):
            with night.registry.reading() as session:
                job = jobs.get(session, job_id)
            if not job.status.final:
                continue
            del open_jobs[adapter]
            good = job.status is JobStatus.SUCCEEDED
            result = {"job": job.id, "version": job.version, "error": job.error_message}
            with night.registry.writing() as session:
                night.finish(session, adapter, "train", result, failed=not good)
        time.sleep(poll_seconds)


def evaluate_all(night: Night) -> None:
    """Scores base, champion and challenger of every adapter on its held-out slices, all questions mixed."""
    adapters_now = night.todo("evaluate")
    if not adapters_now:
        return
    plans, trained = night.done("collect"), night.done("train")
    cells = [
        (adapter, part, dataset, role, model)
        for adapter in adapters_now
        for part, dataset in plans[adapter]["slices"].items()
        for role, model in candidates(night, adapter, plans[adapter]["champion"], trained[adapter]["version"]).items()
    ]
    examples = {dataset: held_out(night, dataset) for _, _, dataset, _, _ in cells}
    tokenizer = ChatTokenizer.load(night.base.folder)
    questions = [question for cell in cells for question in questions_of(cell[4], examples[cell[2]], tokenizer)]
    answers = iter([answered(answer) for answer in ask_all(openai_client(night.settings), questions)])
    scores: dict[str, dict[str, dict[str, Any]]] = {adapter: {} for adapter in adapters_now}
    versions = {
        adapter: {"base": None, "champion": plans[adapter]["champion"], "challenger": trained[adapter]["version"]}
        for adapter in adapters_now
    }
    with night.registry.writing() as session:
        for adapter, part, dataset, role, _ in cells:
            references = [example.completion for example in examples[dataset]]
            result = score([next(answers) for _ in references], references)
            scores[adapter].setdefault(part, {})[role] = asdict(result)
            metrics = {"exact_match": result.exact_match, "token_f1": result.token_f1}
            name = AdapterName.parse(adapter)
            evaluations.add(
                session,
                name,
                version=versions[adapter][role],
                dataset=dataset,
                slice=part,
                examples=result.examples,
                metrics=metrics,
            )
        for adapter in adapters_now:
            night.finish(session, adapter, "evaluate", scores[adapter])


def answered(answer: str | LoramillError) -> str:
    """The answer to a question; raises why there is none."""
    if isinstance(answer, LoramillError):
        raise answer
    return answer


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


def openai_client(settings: Settings) -> AsyncOpenAI:
    """A client of the gateway with the admin's key."""
    key = settings.api_key or settings.admin_key_file.read_text().strip()
    return AsyncOpenAI(base_url=f"{settings.gateway}/v1", api_key=key, max_retries=8, timeout=600)


def gate_all(night: Night) -> None:
    """Decides about each challenger."""
    scores = night.done("evaluate")
    for adapter in night.todo("gate"):
        slices = [slice_scores(part, roles) for part, roles in scores[adapter].items()]
        decision = decide(slices, Thresholds())
        with night.registry.writing() as session:
            night.finish(session, adapter, "gate", asdict(decision))


def slice_scores(part: str, roles: dict[str, dict[str, Any]]) -> SliceScores:
    """A recorded evaluation as the gate takes it."""
    champion = Score(**roles["champion"]) if "champion" in roles else None
    return SliceScores(part, Score(**roles["base"]), champion, Score(**roles["challenger"]))


def promote_all(night: Night) -> None:
    """Carries the decisions out: an alias moves, or nothing does."""
    decisions, trained = night.done("gate"), night.done("train")
    for adapter in night.todo("promote"):
        decision, version = Decision(**decisions[adapter]), trained[adapter]["version"]
        name = AdapterName.parse(adapter)
        with night.registry.writing() as session:
            try:
                if decision.promote:
                    adapters.promote(session, name, version, f"night {night.run.id}: {decision.reason}")
            except Conflict as error:  # its owner has pinned the champion
                decision = Decision(False, error.message)
                night.finish(session, adapter, "gate", asdict(decision))
            if not decision.promote:
                adapters.move(session, name, Alias.CHALLENGER, None, f"night {night.run.id}: {decision.reason}")
            champion = adapters.get(session, name).champion
            night.finish(session, adapter, "promote", {"promoted": decision.promote, "champion": champion})


def by_adapter(steps: Sequence[NightlyStep]) -> dict[str, dict[str, Any]]:
    """Results of a night by adapter and stage, as reports want them."""
    results: dict[str, dict[str, Any]] = {}
    for step in steps:
        results.setdefault(step.adapter, {})[step.step] = step.result
    return results
