"""The record's tests run on SQLite and on a real PostgreSQL server, each test on an empty, migrated database."""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest

from loramill.registry import Registry, datasets, migrate, tenants
from loramill.types import JobSpec

FINGERPRINT = "b" * 64


def _server_binaries() -> Path | None:
    newest_first = sorted(
        Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name), reverse=True
    )
    on_path = [Path(found).resolve().parent for found in filter(None, [shutil.which("initdb")])]
    return next(
        (path for path in newest_first + on_path if (path / "initdb").exists() and (path / "postgres").exists()), None
    )


def _account() -> dict[str, int]:
    """Whom to run the server as: initdb refuses root."""
    if os.getuid() != 0:
        return {}
    names = {entry.pw_name: entry for entry in pwd.getpwall()}
    entry = names.get("postgres") or names["nobody"]
    return {"user": entry.pw_uid, "group": entry.pw_gid}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[str]:
    """The URL of a server of our own, without a database's name."""
    binaries = _server_binaries()
    if binaries is None:
        pytest.skip("no PostgreSQL server is installed here (initdb not found); apt-get install postgresql brings one")
    account = _account()
    home = Path(tempfile.mkdtemp(prefix="loramill-postgresql-"))
    server = None
    try:
        if account:
            os.chown(home, account["user"], account["group"])
        data, port, log = home / "data", _free_port(), (home / "log").open("wb")
        initdb = [binaries / "initdb", "-D", data, "-U", "loramill", "-A", "trust", "-E", "UTF8", "--no-sync"]
        subprocess.run(
            initdb, cwd=home, check=True, stdout=log, stderr=log, extra_groups=[] if account else None, **account
        )
        options = {
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": "",
            "fsync": "off",
            "max_connections": "60",
        }
        command = [binaries / "postgres", "-D", data, "-p", str(port)]
        command += [part for name, value in options.items() for part in ("-c", f"{name}={value}")]
        server = subprocess.Popen(
            command, cwd=home, stdout=log, stderr=log, extra_groups=[] if account else None, **account
        )
        url = f"postgresql://loramill@127.0.0.1:{port}"
        _wait_until_up(server, url, home / "log")
        yield url
    finally:
        if server is not None:
            server.send_signal(signal.SIGINT)
            server.wait(30)
        shutil.rmtree(home, ignore_errors=True)


def _wait_until_up(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    for _ in range(300):
        try:
            psycopg.connect(f"{url}/postgres").close()
            return
        except psycopg.OperationalError:
            assert server.poll() is None, log.read_text()
            time.sleep(0.1)
    raise AssertionError(log.read_text())


@pytest.fixture(scope="session")
def postgresql_template(postgresql_server: str) -> str:
    """The name of a migrated database that is copied for each test: faster than to migrate each."""
    _administer(postgresql_server, "CREATE DATABASE template_loramill")
    migrate(f"{postgresql_server}/template_loramill")
    return "template_loramill"


def _administer(server: str, statement: str) -> None:
    with psycopg.connect(f"{server}/postgres", autocommit=True) as connection:
        connection.execute(statement)


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A database without tables."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'home' / 'loramill.db'}"
        return
    server = request.getfixturevalue("postgresql_server")
    _administer(server, "CREATE DATABASE empty_loramill")
    yield f"{server}/empty_loramill"
    _administer(server, "DROP DATABASE empty_loramill WITH (FORCE)")


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A migrated, empty database."""
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path / 'loramill.db'}"
        migrate(url)
        yield url
        return
    server = request.getfixturevalue("postgresql_server")
    _administer(server, f"CREATE DATABASE test_loramill TEMPLATE {request.getfixturevalue('postgresql_template')}")
    yield f"{server}/test_loramill"
    _administer(server, "DROP DATABASE test_loramill WITH (FORCE)")


@pytest.fixture
def registry(database_url: str, tmp_path: Path) -> Iterator[Registry]:
    registry = Registry.open(database_url, (tmp_path / "artifacts").as_uri())
    yield registry
    registry.close()


@pytest.fixture
def make_spec(registry: Registry) -> Callable[..., JobSpec]:
    """Makes the spec of a job, with its tenant and dataset."""
    files: dict[str, str] = {}

    def make(adapter: str = "acme/support", **changes: object) -> JobSpec:
        tenant = adapter.partition("/")[0]
        if tenant not in files:
            with registry.writing() as session:
                tenants.create(session, tenant)
                files[tenant] = datasets.create(session, tenant, "train.jsonl", "d" * 64, 10, 10).id
        values = {"base": FINGERPRINT, "adapter": adapter, "train": files[tenant], "steps": 5, "batch_size": 2}
        return JobSpec.model_validate(values | changes)

    return make
