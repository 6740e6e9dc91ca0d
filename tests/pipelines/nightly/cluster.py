"""A registry with tenants, with a pool and a gateway that are functions of the test."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence

from loramill.errors import (
    LoramillError,
)
from loramill.names import AdapterName
from loramill.pipelines.nightly.context import NightlyProgress
from loramill.pipelines.nightly.outcome import Outcome, Verdict, outcomes
from loramill.pipelines.nightly.questions import EvalAnswer, EvalQuestion, Keep
from loramill.pipelines.nightly.run import run_nightly
from loramill.registry import (
    Registry,
    adapters,
    datasets,
    jobs,
    nightly,
)
from loramill.settings import Settings
from loramill.types import JobRecord, NightlyStep, VersionRecord


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
