"""Migrations, and databases that can't be used."""

import hashlib
import os
import pickle
import shutil
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import inspect, text

from loramill.errors import DatabaseUnusable, DiskFull, Unavailable
from loramill.registry import Registry, datasets, migrate, tenants
from loramill.registry.database.engine import make_engine, parse_url
from loramill.registry.database.tables import TableBase


def open_at(database_url: str) -> Registry:
    return Registry.open(database_url, "memory://test")


def fingerprints(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}


def test_the_migrations_create_the_schema_of_the_models(database_url):
    engine = make_engine(parse_url(database_url))
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_server_default": True})
        assert compare_metadata(context, TableBase.metadata) == []
        # compare_metadata looks at neither names nor primary keys.
        inspector = inspect(connection)
        for table in TableBase.metadata.sorted_tables:
            key = inspector.get_pk_constraint(table.name)
            assert (key["name"], key["constrained_columns"]) == (
                table.primary_key.name,
                table.primary_key.columns.keys(),
            )
            named = {constraint["name"] for constraint in inspector.get_foreign_keys(table.name)}
            assert named == {constraint.name for constraint in table.foreign_key_constraints}
    engine.dispose()


def test_migrating_again_changes_nothing(empty_url):
    migrate(empty_url)
    registry = open_at(empty_url)
    with registry.writing() as session:
        tenants.create(session, "acme")
    registry.close()
    migrate(empty_url)
    registry = open_at(empty_url)
    with registry.reading() as session:
        assert [tenant.name for tenant in tenants.list_tenants(session)] == ["acme"]
    registry.close()


def test_two_processes_may_migrate_at_once(empty_url, monkeypatch):
    upgrade = command.upgrade

    def slowly(config, revision):
        upgrade(config, revision)
        time.sleep(0.5)  # migrated but not committed: the other one starts

    monkeypatch.setattr(command, "upgrade", slowly)
    with ThreadPoolExecutor(2) as pool:
        for result in [pool.submit(migrate, empty_url) for _ in range(2)]:
            result.result()
    open_at(empty_url).close()


def test_a_registry_is_picklable(registry):
    with registry.writing() as session:
        tenants.create(session, "acme")
    copy = pickle.loads(pickle.dumps(registry))
    with copy.reading() as session:
        assert tenants.get(session, "acme").name == "acme"
    artifact = copy.artifacts.put({"a": b"1"})
    assert registry.artifacts.read(artifact, "a") == b"1"
    copy.close()


def test_a_relative_path_means_the_same_after_a_change_of_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    migrate("sqlite:///here/loramill.db")
    registry = open_at("sqlite:///here/loramill.db")
    monkeypatch.chdir("/")
    pickle.loads(pickle.dumps(registry)).close()
    registry.close()
    assert (tmp_path / "here" / "loramill.db").is_file()


def test_an_unmigrated_database_is_refused_with_the_command_to_run(empty_url):
    with pytest.raises(DatabaseUnusable, match="run `loramill up`"):
        open_at(empty_url)


def test_a_newer_database_is_left_alone(database_url):
    engine = make_engine(parse_url(database_url))
    with engine.execution_options(loramill_writing=True).begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    for attempt in (migrate, open_at):
        with pytest.raises(DatabaseUnusable, match=r"'9999'.*newer loramill"):
            attempt(database_url)
    with engine.connect() as connection:
        assert connection.scalar(text("SELECT version_num FROM alembic_version")) == "9999"
    engine.dispose()


def test_a_database_of_another_program_is_left_alone(empty_url, tmp_path):
    (tmp_path / "home").mkdir()
    engine = make_engine(parse_url(empty_url))
    with engine.execution_options(loramill_writing=True).begin() as connection:
        connection.execute(text("CREATE TABLE bookmarks (id INTEGER)"))
    engine.dispose()
    before = fingerprints(tmp_path / "home")
    with pytest.raises(DatabaseUnusable, match=r"another program.*'bookmarks'.*its own"):
        migrate(empty_url)
    with pytest.raises(DatabaseUnusable):
        open_at(empty_url)
    assert fingerprints(tmp_path / "home") == before


def _garbage(path: Path) -> None:
    path.write_bytes(b"This was never a database.\n" * 300)


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _scratch(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 4 : len(content) // 4 * 3] = os.urandom(len(content) // 4 * 2)
    path.write_bytes(content)


@pytest.mark.parametrize("breakage", [_garbage, _truncate, _scratch])
def test_a_broken_file_is_left_as_it_was(tmp_path, breakage):
    path = tmp_path / "loramill.db"
    migrate(f"sqlite:///{path}")
    breakage(path)
    before = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(DatabaseUnusable, match=r"left unchanged.*backup") as error:
        migrate(f"sqlite:///{path}")
    assert str(path) in error.value.message
    assert hashlib.sha256(path.read_bytes()).hexdigest() == before


def test_files_that_a_crash_left_next_to_a_broken_one_are_kept(tmp_path):
    live, crashed = tmp_path / "live", tmp_path / "crashed"
    migrate(f"sqlite:///{live / 'loramill.db'}")
    registry = open_at(f"sqlite:///{live / 'loramill.db'}")
    with registry.writing() as session:
        tenants.create(session, "acme")
    shutil.copytree(live, crashed)
    registry.close()
    _scratch(crashed / "loramill.db")
    before = fingerprints(crashed)
    assert before.keys() >= {"loramill.db", "loramill.db-wal"}
    with pytest.raises(DatabaseUnusable):
        migrate(f"sqlite:///{crashed / 'loramill.db'}")
    after = fingerprints(crashed)
    assert {name: after.get(name) for name in ("loramill.db", "loramill.db-wal")} == {
        name: before[name] for name in ("loramill.db", "loramill.db-wal")
    }


def test_opening_a_file_that_is_not_a_database(tmp_path):
    path = tmp_path / "loramill.db"
    _garbage(path)
    before = fingerprints(tmp_path)
    with pytest.raises(DatabaseUnusable, match="not an SQLite database"):
        open_at(f"sqlite:///{path}")
    assert fingerprints(tmp_path) == before


def test_opening_does_not_create(tmp_path):
    with pytest.raises(DatabaseUnusable, match=r"no database at.*loramill up"):
        open_at(f"sqlite:///{tmp_path / 'loramill.db'}")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_place_of_the_file(tmp_path):
    for attempt in (migrate, open_at):
        with pytest.raises(DatabaseUnusable, match="cannot be opened"):
            attempt(f"sqlite:///{tmp_path}")


def test_a_folder_that_cannot_be_created(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DatabaseUnusable, match=r"folder .* cannot be created"):
        migrate(f"sqlite:///{tmp_path / 'file' / 'sub' / 'loramill.db'}")


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_not_writable(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(DatabaseUnusable, match="writable"):
        migrate(f"sqlite:///{tmp_path / 'loramill.db'}")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("no url at all", "not a valid URL"),
        ("mysql://host/name", "not in 'mysql'"),
        ("sqlite://", "must outlive"),
        ("sqlite:///:memory:", "must outlive"),
        ("postgresql://loramill:geheim@127.0.0.1:1/loramill", "cannot be reached"),
    ],
)
def test_unusable_urls(url, message):
    for attempt in (migrate, open_at):
        with pytest.raises(DatabaseUnusable, match=message) as error:
            attempt(url)
        assert "geheim" not in error.value.message


def test_a_database_that_the_server_does_not_have(postgresql_server):
    with pytest.raises(DatabaseUnusable, match=r"cannot be reached.*does not exist"):
        open_at(f"{postgresql_server}/nowhere")


def test_a_full_disk_undoes_the_transaction(tmp_path):
    url = f"sqlite:///{tmp_path / 'loramill.db'}"
    migrate(url)
    registry = open_at(url)
    with registry.writing() as session:
        tenants.create(session, "acme")
    with pytest.raises(DiskFull, match="free some space"), registry.writing() as session:
        pages = session.scalar(text("PRAGMA page_count"))
        session.execute(text(f"PRAGMA max_page_count = {pages + 2}"))
        for _ in range(100):
            datasets.create(session, "acme", "x" * 1000, "a" * 64, 1, 1)
    with registry.reading() as session:
        assert datasets.list_datasets(session, "acme") == []
    registry.close()


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_a_lost_connection_is_unavailable_and_then_restored(registry):
    end = text("SELECT pg_terminate_backend(pg_backend_pid())")
    with pytest.raises(Unavailable, match="try again"), registry.writing() as session:
        session.execute(end)
    with registry.reading() as session:
        assert tenants.list_tenants(session) == []


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_a_statement_that_the_server_cancels_is_unavailable(registry):
    with pytest.raises(Unavailable, match="try again"), registry.writing() as session:
        session.execute(text("SET LOCAL statement_timeout = 20"))
        session.execute(text("SELECT pg_sleep(60)"))


def test_a_lock_that_is_never_released_is_unavailable(tmp_path):
    path = tmp_path / "loramill.db"
    migrate(f"sqlite:///{path}")
    registry = open_at(f"sqlite:///{path}")
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    with registry.reading() as session:
        session.execute(text("PRAGMA busy_timeout = 50"))  # for the only connection in the pool
    with pytest.raises(Unavailable, match="does not respond"), registry.writing() as session:
        tenants.create(session, "acme")
    holder.close()
    registry.close()
