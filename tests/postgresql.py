"""A PostgreSQL server of the tests' own, which they can stop and start."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest


class PostgreSQL:
    """A cluster in a folder; `url` has no database name."""

    def __init__(self, binaries: Path, home: Path) -> None:
        self._binaries, self._home, self._account = binaries, home, _account()
        self._port = _free_port()
        self._server: subprocess.Popen[bytes] | None = None
        self.url = f"postgresql://loramill@127.0.0.1:{self._port}"

    @classmethod
    @contextmanager
    def installed(cls) -> Iterator[PostgreSQL]:
        """A new cluster, not started yet; skips the test if PostgreSQL isn't installed."""
        binaries = _server_binaries()
        if binaries is None:
            pytest.skip("no PostgreSQL server is installed here (initdb not found); run `apt-get install postgresql`")
        home = Path(tempfile.mkdtemp(prefix="loramill-postgresql-"))
        server = cls(binaries, home)
        try:
            server._make()
            yield server
        finally:
            server.stop()
            shutil.rmtree(home, ignore_errors=True)

    def start(self) -> None:
        """Returns when the server accepts connections."""
        options = {"listen_addresses": "127.0.0.1", "unix_socket_directories": "", "fsync": "off"}
        command = [self._binaries / "postgres", "-D", self._home / "data", "-p", str(self._port)]
        command += [
            part for name, value in (options | {"max_connections": "60"}).items() for part in ("-c", f"{name}={value}")
        ]
        with (self._home / "log").open("ab") as log:
            self._server = subprocess.Popen(
                command,
                cwd=self._home,
                stdout=log,
                stderr=log,
                extra_groups=[] if self._account else None,
                **self._account,
            )
        for _ in range(300):
            try:
                psycopg.connect(f"{self.url}/postgres").close()
                return
            except psycopg.OperationalError:
                assert self._server.poll() is None, (self._home / "log").read_text()
                time.sleep(0.1)
        raise AssertionError((self._home / "log").read_text())

    def stop(self) -> None:
        """Stops it and ends every connection."""
        if self._server is not None:
            self._server.send_signal(signal.SIGINT)
            self._server.wait(30)
            self._server = None

    def _make(self) -> None:
        if self._account:
            os.chown(self._home, self._account["user"], self._account["group"])
        initdb = [self._binaries / "initdb", "-D", self._home / "data", "-U", "loramill", "-A", "trust", "-E", "UTF8"]
        with (self._home / "log").open("wb") as log:
            subprocess.run(
                [*initdb, "--no-sync"],
                cwd=self._home,
                check=True,
                stdout=log,
                stderr=log,
                extra_groups=[] if self._account else None,
                **self._account,
            )


def _server_binaries() -> Path | None:
    newest_first = sorted(
        Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name), reverse=True
    )
    on_path = [Path(found).resolve().parent for found in filter(None, [shutil.which("initdb")])]
    return next(
        (path for path in newest_first + on_path if (path / "initdb").exists() and (path / "postgres").exists()), None
    )


def _account() -> dict[str, int]:
    """The user to run the server as: initdb refuses root."""
    if os.getuid() != 0:
        return {}
    names = {entry.pw_name: entry for entry in pwd.getpwall()}
    entry = names.get("postgres") or names["nobody"]
    return {"user": entry.pw_uid, "group": entry.pw_gid}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
