"""A small environment: a base, a record, data, and jobs; as a script, a pool of workers.

    python environment.py SETTINGS     each line "SLOT HOLDER" on standard input starts a worker; prints its pid

The workers are forked from a process that has imported and loaded everything, and so start at once.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from loramill.data.tokenizer import ChatTokenizer
from loramill.jobs.scheduling.reconciler import worker_name
from loramill.jobs.worker.worker import Worker, run_jobs
from loramill.models.catalog import Base, find_base, load_for_training
from loramill.registry import Registry, datasets, jobs, migrate, tenants
from loramill.registry.jobs import worker_slots
from loramill.settings import JobSettings, Settings
from loramill.types import JobRecord, JobSpec

WORDS = "one two three four five six seven eight".split()


def rows(words: list[str] = WORDS) -> bytes:
    return b"".join(
        json.dumps(
            {"messages": [{"role": "user", "content": f"say {word}"}, {"role": "assistant", "content": word.upper()}]}
        ).encode()
        + b"\n"
        for word in words
    )


@dataclass(frozen=True)
class JobEnvironment:
    """A record in a home of its own, and what a worker there needs."""

    settings: Settings
    registry: Registry
    base: Base
    model: PreTrainedModel

    @classmethod
    def at(cls, home: Path, base: Path, **fields: Any) -> JobEnvironment:
        quick = {"lease_seconds": 20, "backoff_seconds": 0, "max_attempts": 3, "sessions": 4}
        settings = Settings.load(
            home=home, cache=home / "cache", base=str(base), jobs=JobSettings.model_validate(quick | fields)
        )
        migrate(settings.database)
        return cls.opened(settings)

    @classmethod
    def opened(cls, settings: Settings) -> JobEnvironment:
        base = find_base(settings.base, settings.cache)
        registry = Registry.open(settings.database, settings.artifacts)
        return cls(settings, registry, base, load_for_training(base, torch.float32))

    def worker(self, owner: str = "w1", **fields: Any) -> Worker:
        given = {
            "owner": owner,
            "registry": self.registry,
            "base": self.base,
            "model": lambda: self.model,
            "device": torch.device("cpu"),
            "tokenizer": ChatTokenizer.load(self.base.folder),
            "checkpoints": Path(self.settings.checkpoints),
            "logs": self.settings.home / "logs",
            "settings": self.settings.jobs,
        }
        return Worker(**given | fields)

    def data(self, tenant: str, raw: bytes | None = None) -> str:
        """A dataset of a tenant, which is made if need be."""
        raw = rows() if raw is None else raw
        artifact = self.registry.artifacts.put({"data.jsonl": raw})
        with self.registry.writing() as session:
            if tenant not in {known.name for known in tenants.list_tenants(session)}:
                tenants.create(session, tenant)
            return datasets.create(session, tenant, "rows.jsonl", artifact, len(raw), raw.count(b"\n")).id

    def spec(self, adapter: str, train: str, **fields: Any) -> JobSpec:
        given = {"base": self.base.fingerprint, "adapter": adapter, "train": train, "steps": 2, "batch_size": 2}
        return JobSpec.model_validate(given | {"rank": 4, "dropout": 0.1, "checkpoint_every": 2} | fields)

    def submit(
        self, adapter: str = "acme/loud", *, priority: int = 0, executor: str = "session", **fields: Any
    ) -> JobRecord:
        fields = {"train": self.data(adapter.partition("/")[0])} | fields
        spec = self.spec(adapter, **fields)
        with self.registry.writing() as session:
            return jobs.submit(session, spec, {}, priority=priority, executor=executor, cost=100.0)  # type: ignore[arg-type]

    def now(self, job: JobRecord) -> JobRecord:
        with self.registry.reading() as session:
            return jobs.get(session, job.id)

    def messages(self, job: JobRecord) -> list[str]:
        with self.registry.reading() as session:
            return [event.message for event in jobs.list_events(session, job.id) if event.kind == "message"]

    def weights(self, version: str | None) -> bytes:
        return self.registry.artifacts.read(version or "", "adapter_model.safetensors")


def serve_places() -> None:
    """Starts workers as they are asked for; each ends when its place is not its holder's any more."""
    torch.set_num_threads(1)
    environment = JobEnvironment.opened(Settings.model_validate_json(sys.argv[1]))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    tell("ready")
    for line in sys.stdin:
        place, holder = line.split()
        pid = os.fork()
        if pid == 0:
            run_worker(environment, place, holder)
            os._exit(0)
        tell(str(pid))


def tell(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def run_worker(environment: JobEnvironment, place: str, holder: str) -> None:
    registry = Registry.open(environment.settings.database, environment.settings.artifacts)

    def over(idle: float) -> bool:
        with registry.reading() as session:
            return idle > environment.settings.jobs.idle_seconds or not worker_slots.is_open(session, place, holder)

    run_jobs(
        environment.worker(worker_name(place, os.getpid()), registry=registry, executor="session"), should_stop=over
    )


if __name__ == "__main__":
    serve_places()
