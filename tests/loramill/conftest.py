"""The real gateway on a real registry, with a backend that echoes prompts: the server of the client tests."""

from __future__ import annotations

import itertools
import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import uvicorn

from loramill.client import Client
from loramill.data.tokenizer import ChatTokenizer
from loramill.errors import LoramillError
from loramill.models.catalog import Base
from loramill.registry import Registry, api_keys, jobs
from loramill.registry.database.migrate import migrate
from loramill.serve.api.app import build_api
from loramill.serve.replica.fake import EchoBackend
from loramill.settings import Settings
from loramill.types import VersionRecord

_NUMBERS = itertools.count(1)


def examples(count: int = 12, word: str = "thing") -> bytes:
    """A valid training file."""
    rows = (
        {"messages": [{"role": "user", "content": f"{word} {i}"}, {"role": "assistant", "content": f"code {i}"}]}
        for i in range(count)
    )
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


@dataclass(frozen=True)
class RunningGateway:
    """A gateway in a thread, its registry, and the methods of a training session."""

    url: str
    home: Path
    registry: Registry

    @property
    def admin_key(self) -> str:
        return (self.home / "admin.key").read_text().strip()

    def client(self, key: str | None = None) -> Client:
        return Client(self.url, key or self.admin_key)

    def begin(self, job_id: str, step: int = 1) -> int:
        """Leases the job as a worker does; returns the attempt."""
        with self.registry.writing() as session:
            while (job := jobs.lease(session, "worker", now=time.time(), seconds=600, max_attempts=5)) is not None:
                if job.id == job_id:
                    jobs.heartbeat(
                        session, job_id, job.attempt, jobs.JobProgress(step, 7), now=time.time(), seconds=600
                    )
                    return job.attempt
        raise AssertionError(f"{job_id} doesn't wait")

    def publish(self, job_id: str) -> str:
        """Publishes a version as the job's result, without training; returns it."""
        attempt = self.begin(job_id)
        artifact = self.registry.artifacts.put({"adapter_model.safetensors": job_id.encode()})
        with self.registry.writing() as session:
            spec = jobs.get(session, job_id).spec
            version = VersionRecord(
                id=artifact, adapter=spec.adapter, job=job_id, base=spec.base, bytes=9, created_at=time.time()
            )
            jobs.publish(session, job_id, attempt, version)
        return artifact

    def fail(self, job_id: str, error: LoramillError) -> None:
        """Ends the job with an error."""
        attempt = self.begin(job_id)
        with self.registry.writing() as session:
            jobs.fail(session, job_id, attempt, error, retry=False)


@pytest.fixture(scope="session")
def gateway(tmp_path_factory: pytest.TempPathFactory, base: Base, tokenizer: ChatTokenizer) -> Iterator[RunningGateway]:
    home = tmp_path_factory.mktemp("home")
    settings = Settings.load(home=home)
    migrate(settings.database)
    registry = Registry.open(settings.database, settings.artifacts)
    with registry.writing() as session:
        _, secret = api_keys.create(session, None)
    settings.admin_key_file.write_text(secret + "\n")
    app = build_api(registry=registry, base=base, tokenizer=tokenizer, backend=EchoBackend(), settings=settings)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    yield RunningGateway(f"http://127.0.0.1:{listener.getsockname()[1]}", home, registry)
    server.should_exit = True
    thread.join()
    registry.close()


@pytest.fixture
def tenant(gateway: RunningGateway) -> str:
    """A new tenant for each test."""
    # Not the names of the API tests: both may run in one process, whose metrics count by tenant.
    name = f"customer{next(_NUMBERS)}"
    with gateway.client() as admin:
        admin.tenants.create(name)
    return name
