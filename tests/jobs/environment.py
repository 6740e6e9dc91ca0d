"""A base, a registry, data and jobs for tests; as a script, a pool of workers.

    python -m tests.jobs.environment SETTINGS

Each line "SLOT HOLDER" on standard input starts a worker, and its pid is printed.

The workers are forked from a process that has imported and loaded everything, and so start at once.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from loramill.data.tokenizer import ChatTokenizer
from loramill.jobs.scheduling.reconciler import may_take_another, worker_name
from loramill.jobs.worker.session import run_jobs
from loramill.jobs.worker.worker import Worker
from loramill.models.catalog import Base, find_base, load_for_training
from loramill.registry import Registry, datasets, jobs, tenants
from loramill.registry.jobs import worker_slots
from loramill.settings import JobSettings, Settings
from loramill.types import JobRecord, JobSpec

from ..databases import create_sqlite_database

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
    """A registry in its own home, and the parts of its workers."""

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
        create_sqlite_database(settings.database)
        return cls.opened(settings)

    @classmethod
    def opened(cls, settings: Settings) -> JobEnvironment:
        base = find_base(settings.base, settings.cache)
        registry = Registry.open(settings.database, settings.artifacts)
        return cls(settings, registry, base, load_for_training(base, torch.float32))

    def worker(self, name: str = "w1", **fields: Any) -> Worker:
        defaults = {
            "name": name,
            "registry": self.registry,
            "base": self.base,
            "model": lambda: self.model,
            "device": torch.device("cpu"),
            "tokenizer": ChatTokenizer.load(self.base.folder),
            "checkpoints": Path(self.settings.checkpoints),
            "logs": self.settings.home / "logs",
            "settings": self.settings.jobs,
        }
        return Worker(**defaults | fields)

    def data(self, tenant: str, raw: bytes | None = None) -> str:
        """Creates a dataset of a tenant, and the tenant if it does not exist."""
        raw = rows() if raw is None else raw
        artifact = self.registry.artifacts.put({"data.jsonl": raw})
        with self.registry.writing() as session:
            if tenant not in {known.name for known in tenants.list_tenants(session)}:
                tenants.create(session, tenant)
            return datasets.create(session, tenant, "rows.jsonl", artifact, len(raw), raw.count(b"\n")).id

    def spec(self, adapter: str, train: str, **fields: Any) -> JobSpec:
        defaults = {"base": self.base.fingerprint, "adapter": adapter, "train": train, "steps": 2, "batch_size": 2}
        return JobSpec.model_validate(defaults | {"rank": 4, "dropout": 0.1, "checkpoint_every": 2} | fields)

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


def start_workers() -> None:
    """Starts a worker per line of standard input; each ends when its slot is no longer its holder's."""
    torch.set_num_threads(1)
    environment = JobEnvironment.opened(Settings.model_validate_json(sys.argv[1]))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    write_line("ready")
    for line in sys.stdin:
        slot, holder = line.split()
        pid = os.fork()
        if pid == 0:
            run_worker(environment, slot, holder)
            os._exit(0)
        write_line(str(pid))


def write_line(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def run_worker(environment: JobEnvironment, slot: str, holder: str) -> None:
    registry = Registry.open(environment.settings.database, environment.settings.artifacts)

    def should_stop(idle: float) -> bool:
        with registry.reading() as session:
            return idle > environment.settings.jobs.idle_seconds or not worker_slots.is_open(session, slot, holder)

    def is_turn() -> bool:
        with registry.reading() as session:
            return may_take_another(session, slot, time.time())

    run_jobs(
        environment.worker(worker_name(slot, os.getpid()), registry=registry, executor="session"),
        should_stop=should_stop,
        may_take_another=is_turn,
    )


if __name__ == "__main__":
    start_workers()
