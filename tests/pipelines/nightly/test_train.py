"""Jobs of a nightly run are submitted as the API's are: checked, sized, priced, audited, and for the right executor."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from loramill.data.tokenizer import ChatTokenizer
from loramill.models.catalog import Base
from loramill.names import AdapterName
from loramill.pipelines.nightly import run, train
from loramill.pipelines.nightly.outcome import Verdict, outcomes
from loramill.pipelines.nightly.questions import EvalAnswer, EvalQuestion, Keep
from loramill.registry import Registry, adapters, audit, datasets, jobs, nightly, pool_gpus, tenants
from loramill.registry.database.tables import JobRow
from loramill.settings import Settings
from loramill.sizing import GpuPool, SizingRequest, anatomy, read_config
from loramill.sizing.planner import candidate_plans
from loramill.submission.dataset_checks import DatasetChecks
from loramill.submission.request import JobRequest, LoramillOptions
from loramill.submission.submit import SubmissionContext, Submitter, check_request, queue
from loramill.types import GpuInfo, JobRecord, JobSpec, VersionRecord

from ...databases import create_sqlite_database


class Cluster:
    """A registry, and a pool that trains every queued job as soon as the gateway is checked."""

    def __init__(self, registry: Registry, settings: Settings, base: Base, tokenizer: ChatTokenizer) -> None:
        self.registry, self.settings, self.base = registry, settings, base
        self.checks = DatasetChecks(registry.artifacts, tokenizer)

    @property
    def context(self) -> SubmissionContext:
        return SubmissionContext(self.base, self.settings.jobs, self.checks)

    def upload(self, tenant: str, rows: Sequence[dict[str, Any]]) -> str:
        raw = "".join(json.dumps(row) + "\n" for row in rows).encode()
        artifact = self.registry.artifacts.put({"data.jsonl": raw})
        with self.registry.writing() as session:
            return datasets.create(session, tenant, "rows.jsonl", artifact, len(raw), len(rows)).id

    def submit(self, adapter: str, rows: Sequence[dict[str, Any]], **options: Any) -> JobRecord:
        """Submits a job as the API does, and trains it: the adapter's first version becomes its champion."""
        name = AdapterName.parse(adapter)
        request = JobRequest(name, self.upload(name.tenant, rows), options=LoramillOptions(**options))
        with self.registry.writing() as session:
            job = queue(session, check_request(session, request, self.context), Submitter(None, "key-1", "req-1"))
        self.check()
        return job

    def feed(self, adapter: str, rows: Sequence[dict[str, Any]]) -> None:
        name = AdapterName.parse(adapter)
        file = self.upload(name.tenant, rows)
        with self.registry.writing() as session:
            nightly.add_data(session, name, file, None)

    def check(self) -> None:
        """Trains all queued jobs."""
        while True:
            with self.registry.writing() as session:
                job = jobs.lease(session, "worker", now=time.time(), seconds=60, max_attempts=1)
            if job is None:
                return
            version = self.registry.artifacts.put({"adapter_config.json": job.id.encode()})
            record = VersionRecord(
                id=version, adapter=job.spec.adapter, job=job.id, base=job.spec.base, bytes=9, created_at=time.time()
            )
            with self.registry.writing() as session:
                jobs.publish(session, job.id, job.attempt, record)

    def answer_all(
        self, questions: Sequence[EvalQuestion], report: Callable[[int], None], keep: Keep | None = None
    ) -> list[EvalAnswer]:
        return [EvalAnswer(f"answer {question.messages[-1]['content']}") for question in questions]

    def run(self) -> dict[str, Any]:
        """Runs a nightly run; outcomes by adapter."""
        found = run.run_nightly(self.registry, self.settings, gateway=self)  # type: ignore[arg-type]
        with self.registry.reading() as session:
            return {each.adapter: each for each in outcomes(nightly.list_steps(session, found.id))}

    def latest(self, adapter: str) -> JobRecord:
        with self.registry.reading() as session:
            return next(job for job in jobs.list_jobs(session, tenant=None) if job.spec.adapter == adapter)

    def champion(self, adapter: str) -> str | None:
        with self.registry.reading() as session:
            return adapters.get(session, adapter).champion

    def cost(self, job: JobRecord) -> float:
        with self.registry.reading() as session:
            return session.get_one(JobRow, job.id).cost

    def events(self, job: JobRecord) -> list[str]:
        with self.registry.reading() as session:
            return [event.message for event in jobs.list_events(session, job.id)]


@pytest.fixture
def cluster(tmp_path: Path, base: Base, tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    url = f"sqlite:///{tmp_path / 'loramill.db'}"
    create_sqlite_database(url)
    registry = Registry.open(url, (tmp_path / "artifacts").as_uri())
    with registry.writing() as session:
        tenants.create(session, "acme")
        tenants.create(session, "bolt")
    monkeypatch.setattr(run, "find_base", lambda *_: base)
    monkeypatch.setattr(ChatTokenizer, "load", lambda *_: tokenizer)
    monkeypatch.setattr(train.time, "sleep", lambda seconds: None)
    yield Cluster(registry, Settings.load(home=tmp_path), base, tokenizer)
    registry.close()


def rows(count: int, word: str = "thing") -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "user", "content": f"{word} {number}"},
                {"role": "assistant", "content": f"answer {word} {number}"},
            ]
        }
        for number in range(count)
    ]


@pytest.mark.parametrize("options", [{"method": "full"}, {"gpus": 2}])
def test_a_champion_of_a_dedicated_trainer_is_retrained_by_one(cluster: Cluster, options: dict[str, Any]) -> None:
    first = cluster.submit("acme/a", rows(12), **options)
    champion = cluster.champion("acme/a")
    cluster.feed("acme/a", rows(12, "new"))
    assert cluster.run()["acme/a"].stage == "promote"
    job = cluster.latest("acme/a")
    assert job.id != first.id and job.executor == "dedicated" and job.spec.start_from == champion
    assert (job.spec.method, job.spec.gpus) == (first.spec.method, first.spec.gpus)


def test_data_that_no_longer_fits_fails_its_adapter_alone(cluster: Cluster) -> None:
    spec = JobSpec(base="0" * 64, adapter="acme/a", train="file", steps=1, batch_size=8)
    request = SizingRequest(
        spec=spec,
        base=anatomy(read_config(str(cluster.base.folder))),
        quantization="none",
        lengths=(60,),
        pool=GpuPool("cpu", 2**40),
        adjustable=frozenset({"micro_tokens", "gradient_checkpointing"}),
    )
    budget = min(each.memory.bytes for each in candidate_plans(request)) * 21 // 20
    jobs_settings = cluster.settings.jobs.model_copy(update={"device_bytes": budget})
    cluster.settings = cluster.settings.model_copy(update={"jobs": jobs_settings})
    cluster.submit("acme/long", rows(12))
    cluster.submit("bolt/short", rows(12))
    cluster.feed("acme/long", rows(12, "word " * 400))
    cluster.feed("bolt/short", rows(12, "new"))
    found = cluster.run()
    failed, other = found["acme/long"], found["bolt/short"]
    assert (failed.verdict, failed.stage) == (Verdict.FAILED, "train")
    assert "The job needs" in failed.reason and "Nearest jobs that fit" in failed.reason
    assert other.verdict in (Verdict.PROMOTED, Verdict.HELD)
    with cluster.registry.reading() as session:
        assert [each.adapter for each in nightly.list_set_aside(session)] == ["acme/long"]
    assert any(event.startswith("Fits: about") for event in cluster.events(cluster.latest("bolt/short")))


def test_jobs_are_sized_for_the_smallest_gpu_that_sessions_reported(cluster: Cluster) -> None:
    on_gpus = cluster.settings.jobs.model_copy(update={"use_gpu": True})
    cluster.settings = cluster.settings.model_copy(update={"jobs": on_gpus})
    unknown = cluster.submit("acme/first", rows(12))
    assert not any(event.startswith("Fits") for event in cluster.events(unknown))
    with cluster.registry.writing() as session:
        for name, size in (("NVIDIA L4", 22 << 30), ("NVIDIA H100", 79 << 30)):
            pool_gpus.report(session, GpuInfo(name=name, bytes=size, capability=(9, 0)), now=time.time())
    sized = cluster.submit("acme/second", rows(12))
    assert any("of 23.6 GB" in event for event in cluster.events(sized))
    typed = cluster.settings.jobs.model_copy(update={"device_bytes": 2**33})
    cluster.settings = cluster.settings.model_copy(update={"jobs": typed})
    assert any("of 8.59 GB" in event for event in cluster.events(cluster.submit("acme/third", rows(12))))


def test_each_job_of_a_nightly_run_has_an_audit_entry(cluster: Cluster) -> None:
    cluster.feed("acme/a", rows(12))
    cluster.feed("bolt/b", rows(12))
    cluster.run()
    for adapter in ("acme/a", "bolt/b"):
        job = cluster.latest(adapter)
        with cluster.registry.reading() as session:
            (entry,) = audit.list_changes(session, adapter.partition("/")[0])
        assert (entry.action, entry.subject, entry.actor, entry.key) == ("job.create", job.id, None, "nightly")
        assert entry.request == job.metadata["nightly_run"] and entry.details == {"adapter": adapter}


def test_a_job_costs_as_much_as_the_same_job_of_the_api(cluster: Cluster) -> None:
    cluster.feed("acme/a", rows(30))
    cluster.run()
    job = cluster.latest("acme/a")
    request = JobRequest(AdapterName("acme", "a"), job.spec.train, job.spec.valid, base=cluster.base.name)
    with cluster.registry.reading() as session:
        checked = check_request(session, request, cluster.context)
    assert checked.spec == job.spec and checked.executor == job.executor
    assert cluster.cost(job) == checked.cost
    assert 0 < checked.cost < job.spec.steps * job.spec.batch_size * job.spec.max_length / 10
