"""The registry's tests run on SQLite and on a real PostgreSQL server, each test on an empty, migrated database."""

from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest

from loramill.registry import Registry, datasets, migrate, tenants
from loramill.types import JobSpec

from ...databases import create_sqlite_database
from ...postgresql import PostgreSQL

FINGERPRINT = "b" * 64


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[str]:
    """The URL of a server for these tests, without a database name."""
    with PostgreSQL.installed() as server:
        server.start()
        yield server.url


@pytest.fixture(scope="session")
def postgresql_template(postgresql_server: str) -> str:
    """The name of a migrated database that is copied for each test, which is faster than migrating."""
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
        create_sqlite_database(url)
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
