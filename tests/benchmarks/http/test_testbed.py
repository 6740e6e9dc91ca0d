"""The parts of a site: each is started as its settings say, when it is wanted."""

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


def test_loramill_is_started_with_the_sites_settings_alone(tmp_path: Path, monkeypatch, tiny: Base) -> None:
    seen: dict[str, Any] = {}

    @contextmanager
    def spy(command: Sequence[str], environment: dict[str, str], log: Path, health: str) -> Iterator[None]:
        seen.update(command=command, environment=environment, log=log, health=health)
        (tmp_path / "admin.key").write_text("secret\n")
        yield

    monkeypatch.setattr(servers, "running_process", spy)

    def publish(settings: Settings, base: Base, seed: int) -> PublishedAdapters:
        seen.update(record=(settings.database, settings.artifacts))
        return PublishedAdapters({}, {"a/b": ()})

    monkeypatch.setattr(testbed, "publish", publish)
    monkeypatch.setenv("LORAMILL_DATABASE_URL", "sqlite:////mine.db")
    monkeypatch.setenv("LORAMILL_SERVE__KV_TOKENS", "4096")
    monkeypatch.setenv("LORAMILL_SERVE__PORT", "8400")
    with testbed.Testbed(tiny, Settings.load(), tmp_path, None, 0) as there:
        server = there.loramill
        assert there.loramill is server
    assert seen["command"] == [sys.executable, "-m", "loramill.cli", "up"]
    for name in list(os.environ):
        if name.startswith("LORAMILL_"):
            monkeypatch.delenv(name)
    for name, value in seen["environment"].items():
        monkeypatch.setenv(name, value)
    told = Settings.load()
    assert (told.database, told.artifacts) == seen["record"]
    assert (told.home, told.base, told.database_url, told.serve) == (tmp_path, "tiny", None, there.serve)
    assert (told.serve.kv_tokens, told.serve.threads, told.serve.device) == (4096, os.cpu_count(), "cpu")
    assert told.serve.port == server.port != 8400
    assert (server.key, seen["health"]) == ("secret", f"http://127.0.0.1:{server.port}/readyz")


def test_threads_that_were_asked_for_stay(tiny: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAMILL_SERVE__THREADS", "17")
    assert testbed.Testbed(tiny, Settings.load(), tmp_path, None, 0).serve.threads == 17


def test_without_vllm_nobody_can_ask_it(tiny: Base, tmp_path: Path) -> None:
    with testbed.Testbed(tiny, Settings.load(), tmp_path, None, 0) as there, pytest.raises(SetupError, match="--vllm"):
        there.vllm_base  # noqa: B018


def test_work_alone_is_in_another_process_with_its_own_environment() -> None:
    before = dict(os.environ)
    with WorkerProcess({"GOMP_SPINCOUNT": "0", "VARIABLE": "value"}) as alone:
        assert dict(os.environ) == before
        pid = alone.call(os.getpid)
        assert pid != os.getpid()
        assert alone.submit(os.getenv, "VARIABLE").result() == "value"
        assert alone.call(os.getpid) == pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
