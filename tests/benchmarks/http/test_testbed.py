"""The parts of a testbed: each is started by its settings, on first use."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from loramill.errors import SetupError
from loramill.models.catalog import Base
from loramill.settings import Settings
from loramill_bench.http import servers, testbed
from loramill_bench.http.publish import PublishedAdapters
from loramill_bench.http.worker_process import WorkerProcess


def test_loramill_is_started_with_the_testbeds_settings_alone(tmp_path: Path, monkeypatch, tiny: Base) -> None:
    started: dict[str, Any] = {}

    @contextmanager
    def spy(command: Sequence[str], environment: dict[str, str], log: Path, health: str) -> Iterator[None]:
        started.update(command=command, environment=environment, log=log, health=health)
        (tmp_path / "admin.key").write_text("secret\n")
        yield

    monkeypatch.setattr(servers, "running_process", spy)

    def publish(settings: Settings, base: Base, seed: int) -> PublishedAdapters:
        started.update(record=(settings.database, settings.artifacts))
        return PublishedAdapters({}, {"a/b": ()})

    monkeypatch.setattr(testbed, "publish", publish)
    monkeypatch.setenv("LORAMILL_DATABASE_URL", "sqlite:////mine.db")
    monkeypatch.setenv("LORAMILL_SERVE__KV_TOKENS", "4096")
    monkeypatch.setenv("LORAMILL_SERVE__PORT", "8400")
    with testbed.Testbed(tiny, Settings.load(), tmp_path, None, 0) as bed:
        server = bed.loramill
        assert bed.loramill is server
    assert started["command"] == [sys.executable, "-m", "loramill.cli", "up"]
    for name in list(os.environ):
        if name.startswith("LORAMILL_"):
            monkeypatch.delenv(name)
    for name, value in started["environment"].items():
        monkeypatch.setenv(name, value)
    read = Settings.load()
    assert (read.database, read.artifacts) == started["record"]
    assert (read.home, read.base, read.database_url, read.serve) == (tmp_path, "tiny", None, bed.serve)
    assert (read.serve.kv_tokens, read.serve.threads, read.serve.device) == (4096, os.cpu_count(), "cpu")
    assert read.serve.port == server.port != 8400
    assert (server.key, started["health"]) == ("secret", f"http://127.0.0.1:{server.port}/readyz")


def test_a_requested_number_of_threads_is_kept(tiny: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAMILL_SERVE__THREADS", "17")
    assert testbed.Testbed(tiny, Settings.load(), tmp_path, None, 0).serve.threads == 17


def test_without_vllm_its_servers_are_an_error(tiny: Base, tmp_path: Path) -> None:
    with testbed.Testbed(tiny, Settings.load(), tmp_path, None, 0) as bed, pytest.raises(SetupError, match="--vllm"):
        bed.vllm_base  # noqa: B018


def test_a_worker_process_has_its_own_environment() -> None:
    before = dict(os.environ)
    with WorkerProcess({"GOMP_SPINCOUNT": "0", "VARIABLE": "value"}) as worker:
        assert dict(os.environ) == before
        pid = worker.call(os.getpid)
        assert pid != os.getpid()
        assert worker.submit(os.getenv, "VARIABLE").result() == "value"
        assert worker.call(os.getpid) == pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
