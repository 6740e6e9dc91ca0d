"""Failures of `loramill up`: one sentence with the cause and the fix, no traceback, no lost data."""

from __future__ import annotations

import asyncio
import http.server
import io
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from rich.console import Console

from loramill.errors import Conflict, DiskFull, NotEnoughMemory, SetupError
from loramill.local import cluster_process, preparation
from loramill.local import up as local_up
from loramill.local.machine import MachineMemory
from loramill.models.catalog import Base
from loramill.pipelines.nightly.gateway import openai_client
from loramill.registry import Registry, api_keys, datasets, jobs, migrate, tenants
from loramill.settings import Settings
from loramill.types import JobSpec


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def up(home: Path, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LORAMILL_")}
    environment |= {"LORAMILL_HOME": str(home), **variables}
    command = [sys.executable, "-m", "loramill.cli", "up", *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def one_sentence(ended: subprocess.CompletedProcess[str]) -> str:
    assert ended.returncode == 1
    assert "Traceback" not in ended.stdout + ended.stderr
    return " ".join(ended.stderr.split())


def test_a_taken_port(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        message = one_sentence(up(tmp_path, LORAMILL_SERVE__PORT=str(port)))
    assert str(port) in message
    assert "--port" in message


def test_a_broken_database_file_is_left_as_it_was(tmp_path: Path) -> None:
    broken = b"this is no database, but it may be somebody's" * 100
    (tmp_path / "loramill.db").write_bytes(broken)
    message = one_sentence(up(tmp_path))
    assert str(tmp_path / "loramill.db") in message
    assert (tmp_path / "loramill.db").read_bytes() == broken


def test_a_base_folder_without_a_model(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    message = one_sentence(up(tmp_path / "home", LORAMILL_BASE=str(tmp_path / "model")))
    assert str(tmp_path / "model") in message
    assert "config.json" in message


def test_a_home_that_cannot_be_created(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    message = one_sentence(up(tmp_path / "file" / "home"))
    assert "LORAMILL_HOME" in message


def test_a_cache_that_cannot_be_created(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    message = one_sentence(up(tmp_path / "home", LORAMILL_CACHE=str(tmp_path / "file" / "cache")))
    assert "LORAMILL_CACHE" in message and "is not writable" in message


def test_the_error_is_reported_with_detach_too(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    message = one_sentence(up(tmp_path / "home", "--detach", LORAMILL_BASE=str(tmp_path / "model")))
    assert "config.json" in message
    assert local_up.down(Settings.load(home=tmp_path / "home")) is False


def test_an_unknown_setting(tmp_path: Path) -> None:
    message = one_sentence(up(tmp_path, LORAMILL_SERVE__PROT="1"))
    assert "prot" in message.lower()


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "FREE_BYTES", 1 << 62)
    with pytest.raises(DiskFull, match="MiB free"):
        preparation.prepare_home(tmp_path / "home")


def test_a_home_that_is_in_use(tmp_path: Path) -> None:
    settings = Settings.load(home=tmp_path)
    with (
        local_up.home_lock(settings),
        pytest.raises(Conflict, match=rf"process {os.getpid()}.*loramill down"),
        local_up.home_lock(settings),
    ):
        pass
    assert local_up.down(settings) is False  # the lock was released with its holder


class Gateway(BaseHTTPRequestHandler):
    """Answers each path with the status that the test sets; other paths are 404."""

    statuses: ClassVar[dict[str, int]] = {}
    paths: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.paths.append(self.path)
        self.send_response(self.statuses.get(self.path, 404))
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


class Cluster:
    """Replaces the child process."""

    killed = False

    def poll(self) -> None:
        return None

    def kill(self) -> None:
        self.killed = True


@pytest.mark.parametrize(
    ("statuses", "killed"),
    [
        ({"/healthz": 200, "/health": 200, "/readyz": 503}, False),
        ({"/healthz": 200, "/health": 503, "/readyz": 503}, True),
        ({"/healthz": 500, "/health": 500, "/readyz": 500}, True),
    ],
    ids=["database", "engine", "gateway"],
)
def test_an_unhealthy_engine_ends_the_cluster_but_a_database_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, statuses: dict[str, int], killed: bool
) -> None:
    monkeypatch.setattr(cluster_process, "UNHEALTHY_SECONDS", 0.0)
    monkeypatch.setattr(Gateway, "statuses", statuses)
    monkeypatch.setattr(Gateway, "paths", [])

    class SetAfterThreeRequests(threading.Event):
        """Set once the gateway has had three requests; `wait` does not pause."""

        def wait(self, timeout: float | None = None) -> bool:
            return len(Gateway.paths) >= 3

    with ThreadingHTTPServer(("127.0.0.1", 0), Gateway) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        settings = Settings.load(home=tmp_path, serve={"port": server.server_port})
        cluster: Any = Cluster()
        cluster_process.wait_unhealthy(settings, cluster, SetAfterThreeRequests())
        server.shutdown()
    assert cluster.killed is killed


def test_an_unusable_store_is_reported_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    message = one_sentence(up(tmp_path / "home", LORAMILL_ARTIFACTS_URL=f"file://{tmp_path}/file/store"))
    assert "artifacts_url" in message and "file/store" in message
    assert not (tmp_path / "home" / "loramill.db").exists()


def test_jobs_for_other_bases_are_counted(tmp_path: Path, base: Base) -> None:
    settings = Settings.load(home=tmp_path)
    migrate(settings.database)
    assert list(preparation.describe_other_bases(settings, base)) == []
    registry = Registry.open(settings.database, settings.artifacts)
    with registry.writing() as session:
        tenants.create(session, "acme")
        train = datasets.create(session, "acme", "a.jsonl", "d" * 64, 1, 1).id
        for fingerprint in ("f" * 64, "f" * 64, base.fingerprint):
            spec = JobSpec(base=fingerprint, adapter="acme/bot", train=train, steps=1, batch_size=1)
            jobs.submit(session, spec, {})
    registry.close()
    (line,) = preparation.describe_other_bases(settings, base)
    assert line.startswith("2 jobs for other bases than smollm2-135m: queued until")


def test_the_admin_key_stays_while_it_is_valid_and_is_replaced_when_it_is_not(tmp_path: Path) -> None:
    settings = Settings.load(home=tmp_path)
    migrate(settings.database)
    preparation.ensure_admin_key(settings)
    first = settings.admin_key_file.read_text()
    assert settings.admin_key_file.stat().st_mode & 0o777 == 0o600
    preparation.ensure_admin_key(settings)
    assert settings.admin_key_file.read_text() == first
    registry = Registry.open(settings.database, settings.artifacts)
    with registry.writing() as session:
        api_keys.revoke(session, api_keys.authenticate(session, first.strip()).id)
    preparation.ensure_admin_key(settings)
    assert settings.admin_key_file.read_text() != first


def test_too_little_memory_is_refused_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_up, "free_memory", lambda: MachineMemory(2 * 10**9, "this machine"))
    monkeypatch.setattr(local_up, "run_cluster", lambda settings: pytest.fail("it was started"))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    settings = Settings.load(home=tmp_path, serve={"port": free_port()})
    with pytest.raises(NotEnoughMemory, match=r"2\.0 GB of memory is free .* needs 2\.6 GB"):
        local_up.up(settings, console=Console(quiet=True))


#: What the script of a failed cluster does after its error; its standard input is closed to stop it.
FAILS = {
    "it exits": "sys.exit(3)",
    "it keeps running": "sys.stdin.read()",
}


@pytest.mark.parametrize("ending", FAILS.values(), ids=FAILS)
def test_a_failed_start_is_reported_with_its_first_error(
    ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = f"""
import logging, sys
sys.stdin.readline()
logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
logging.getLogger("loramill.cluster").error("The engine has no weights.")
logging.getLogger("loramill.cluster").error("noise of the end")
print("more noise", flush=True)
{ending}
"""
    monkeypatch.setattr(cluster_process, "CLUSTER", ("-c", script))
    monkeypatch.setattr(cluster_process, "ERROR_GRACE_SECONDS", 0.1)
    settings = Settings.load(home=tmp_path, serve={"port": free_port()})
    preparation.prepare_home(settings.home)
    with pytest.raises(SetupError, match=r"did not start: The engine has no weights\. See .*up\.log"):
        local_up.supervise(settings, Console(quiet=True), threading.Event(), lambda: None)
    assert "noise of the end" in (tmp_path / "logs" / "up.log").read_text()


def test_a_cluster_that_ends_without_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_process, "CLUSTER", ("-c", "raise SystemExit(7)"))
    settings = Settings.load(home=tmp_path, serve={"port": free_port()})
    preparation.prepare_home(settings.home)
    with pytest.raises(SetupError, match="its process ended with status 7"):
        local_up.supervise(settings, Console(quiet=True), threading.Event(), lambda: None)


class RecordingHandler(http.server.BaseHTTPRequestHandler):
    """A ready gateway, or a proxy; records the paths of its requests."""

    def do_GET(self) -> None:
        self.server.paths.append(self.path)  # type: ignore[attr-defined]
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.end_headers()
        self.wfile.write(b'{"status": "ready", "object": "list", "data": []}')

    def log_message(self, *_: object) -> None:
        """Logs nothing."""


@pytest.fixture
def recording_server() -> Iterator[http.server.ThreadingHTTPServer]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), RecordingHandler) as server:
        server.paths = []  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def dead_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")


@pytest.mark.usefixtures("dead_proxy")
def test_the_local_gateway_is_reached_without_a_proxy(
    tmp_path: Path, recording_server: http.server.ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_process, "CLUSTER", ("-c", "import sys; sys.stdin.read()"))
    settings = Settings.load(home=tmp_path, serve={"port": recording_server.server_port}, api_key="lm-x")
    preparation.prepare_home(settings.home)
    monkeypatch.setattr(cluster_process, "START_SECONDS", 20.0)
    stop = threading.Event()
    local_up.supervise(settings, Console(quiet=True), stop, stop.set)
    assert recording_server.paths[0] == "/readyz"  # type: ignore[attr-defined]


@pytest.mark.usefixtures("dead_proxy")
def test_the_nightly_client_bypasses_the_proxy_for_this_machine_only(
    recording_server: http.server.ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def request(url: str) -> None:
        async with openai_client(url, "lm-x") as client:
            await client.models.list()

    asyncio.run(request(f"http://127.0.0.1:{recording_server.server_port}"))
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{recording_server.server_port}")
    asyncio.run(request("http://gateway.example:8400"))
    assert recording_server.paths == ["/v1/models", "http://gateway.example:8400/v1/models"]  # type: ignore[attr-defined]


def test_a_missing_compiler_is_reported_once(
    tmp_path: Path, recording_server: http.server.ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(cluster_process, "CLUSTER", ("-c", "import sys; sys.stdin.read()"))
    monkeypatch.setattr(local_up, "check_port", lambda settings: None)  # the gateway already uses the port
    output, settings = io.StringIO(), Settings.load(home=tmp_path, serve={"port": recording_server.server_port})
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        local_up.up(settings, console=Console(file=output), on_ready=lambda: signal.raise_signal(signal.SIGTERM))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert output.getvalue().count("no C compiler") == 1
    assert "loramill is up" in output.getvalue() and "Stopped." in output.getvalue()
