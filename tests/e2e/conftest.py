"""One real `loramill up` for all end-to-end tests: real Ray, real SmolLM2, a real database."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from openai import OpenAI

from loramill import Client
from loramill.registry import Registry
from loramill.settings import Settings


@dataclass
class Mill:
    """A running system, and what tests need to look into it."""

    home: Path
    environment: dict[str, str]
    up: subprocess.Popen[bytes] = field(init=False)

    def start(self) -> None:
        self.up = subprocess.Popen(self.command("up"), env=self.environment)
        deadline = time.monotonic() + 240
        while not (self.settings.admin_key_file.exists() and self.client().is_ready()):
            assert self.up.poll() is None, f"`up` ended with {self.up.returncode}; see {self.home / 'logs' / 'up.log'}"
            assert time.monotonic() < deadline, "`up` did not come up"
            time.sleep(0.2)

    def stop(self) -> None:
        self.up.terminate()
        assert self.up.wait(90) == 0

    def command(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "loramill.cli", *words]

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*words), env=self.environment, capture_output=True, text=True, timeout=600, check=False
        )

    @property
    def settings(self) -> Settings:
        port = int(self.environment["LORAMILL_SERVE__PORT"])
        found = Settings.load(home=self.home)
        return found.model_copy(update={"serve": found.serve.model_copy(update={"port": port})})

    @property
    def registry(self) -> Registry:
        return Registry.open(self.settings.database, self.settings.artifacts)

    def admin_key(self) -> str:
        return self.settings.admin_key_file.read_text().strip()

    def client(self, key: str | None = None) -> Client:
        return Client(self.settings.gateway, key or self.admin_key())

    def openai(self, key: str) -> OpenAI:
        return OpenAI(base_url=f"{self.settings.gateway}/v1", api_key=key, max_retries=0, timeout=300)

    def processes(self, *marks: str) -> list[int]:
        """The processes below `up` whose command line holds all of `marks`."""
        listing = subprocess.run(["ps", "-eww", "-o", "pid,ppid,args"], capture_output=True, text=True, check=True)
        table = [line.split(None, 2) for line in listing.stdout.splitlines()[1:]]
        below = {str(self.up.pid)}
        for _ in range(6):
            below |= {pid for pid, parent, *_ in table if parent in below}
        return [int(pid) for pid, _, *args in table if pid in below and args and all(mark in args[0] for mark in marks)]

    def listeners(self) -> int:
        """The number of sockets that listen on the gateways' port."""
        port = f":{self.settings.serve.port:04X}"
        sockets = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        return sum(address.endswith(port) and state == "0A" for _, address, _, state, *_ in sockets)

    def tenant(self, name: str) -> str:
        """Creates a tenant; returns a key of its own."""
        with self.client() as client:
            client.tenants.create(name)
            return client.keys.create(name).key


#: A proxy that is set for all programs, as on many office machines, and cannot reach this machine itself.
DEAD_PROXY = {
    name: "http://127.0.0.1:9" for word in ("http_proxy", "https_proxy", "all_proxy") for name in (word, word.upper())
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(home: Path, **settings: str) -> Iterator[Mill]:
    """A system in a home of its own, in a hostile environment: a proxy, a long TMPDIR.

    `settings` are environment variables without their LORAMILL_.
    """
    scratch = home / ("a long name " * 8).strip() / ("another " * 8).strip()
    scratch.mkdir(parents=True)
    environment = {
        **DEAD_PROXY,
        "TMPDIR": str(scratch),
        **{
            name: value
            for name, value in os.environ.items()
            if not name.startswith("LORAMILL_") and not name.lower().endswith("_proxy") and name != "TMPDIR"
        },
        **{f"LORAMILL_{name}": value for name, value in settings.items()},
        "LORAMILL_HOME": str(home),
        "LORAMILL_SERVE__PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
    }
    system = Mill(home, environment)
    try:
        system.start()
        yield system
    finally:
        if system.up.poll() is None:
            system.stop()


@pytest.fixture(scope="session")
def mill(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mill]:
    settings = {
        "JOBS__SESSIONS": "2",
        "JOBS__LEASE_SECONDS": "5",
        "JOBS__BACKOFF_SECONDS": "0.2",
        "JOBS__IDLE_SECONDS": "600",
    }
    with running(tmp_path_factory.mktemp("Müller & Söhne"), **settings) as system:
        yield system
