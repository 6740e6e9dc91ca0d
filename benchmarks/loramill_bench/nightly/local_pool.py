"""A pool and a gateway in this process: nightly runs with real training and real answers."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from loramill.errors import LoramillError
from loramill.jobs.worker.session import run_jobs
from loramill.models.catalog import Base
from loramill.names import AdapterName
from loramill.pipelines.nightly.questions import EvalAnswer, EvalQuestion
from loramill.registry import Registry, adapters, datasets, migrate, nightly, tenants
from loramill.serve.offline import OfflineEngine
from loramill.serve.protocol import TextRequest
from loramill.serve.sampling_params import SamplingParams
from loramill.settings import ServeSettings, Settings
from loramill_bench.training.worker import bench_worker

TENANT = "bench"
#: Seconds without a job after which the pool has trained all of them.
_IDLE_SECONDS = 1.0


class LocalPool:
    """Trains queued jobs and answers questions in this process; see `EvalGateway`."""

    def __init__(self, base: Base, registry: Registry, settings: Settings) -> None:
        self._base, self._registry = base, registry
        self._worker = bench_worker(base, registry, settings)

    def check(self) -> None:
        """Trains all queued jobs together."""
        run_jobs(self._worker, should_stop=lambda idle: idle > _IDLE_SECONDS)

    def answer_all(
        self,
        questions: Sequence[EvalQuestion],
        report: Callable[[int], None],
        keep: Callable[[int, EvalAnswer], None] = lambda index, answer: None,
    ) -> list[EvalAnswer | LoramillError]:
        """Answers in shared batches; none is kept, since no run is resumed."""
        serve = ServeSettings(threads=1, device="cpu")
        with OfflineEngine(self._base, self._registry.artifacts.fetch, serve) as engine:
            answers = engine.generate(map(self._request, questions), ordered=True)
            return [each.error or EvalAnswer(each.text, each.finish == "length") for each in answers]

    def _request(self, question: EvalQuestion) -> TextRequest:
        name, _, version = question.model.partition("@")
        if version:
            with self._registry.reading() as session:
                version = adapters.resolve(session, name, version).id
        return TextRequest(
            id="",
            tenant=TENANT,
            version=version or None,
            messages=question.messages,
            tools=question.tools,
            prompt=question.prompt,
            sampling_params=SamplingParams(max_tokens=question.max_tokens),
        )


@contextmanager
def scratch_registry() -> Iterator[tuple[Registry, Settings]]:
    """A new registry with one tenant, and its settings."""
    with tempfile.TemporaryDirectory(prefix="loramill-bench-") as home:
        settings = Settings.load(home=Path(home))
        migrate(settings.database)
        with closing(Registry.open(settings.database, settings.artifacts)) as registry:
            with registry.writing() as session:
                tenants.create(session, TENANT)
            yield registry, settings


def add_data(registry: Registry, name: AdapterName, rows: Sequence[bytes]) -> None:
    """Adds lines of JSON to the new data of an adapter."""
    raw = b"\n".join(rows) + b"\n"
    artifact = registry.artifacts.put({"data.jsonl": raw})
    with registry.writing() as session:
        file = datasets.create(session, TENANT, "new.jsonl", artifact, len(raw), len(rows))
        nightly.add_data(session, name, file.id, None)
