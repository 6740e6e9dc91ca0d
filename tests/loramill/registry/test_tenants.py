"""Tenants, keys and datasets: ownership and access."""

import hashlib
import sqlite3
from pathlib import Path

import pytest
from sqlalchemy import text

from loramill.errors import Conflict, InvalidRequest, NotFound, Unauthenticated
from loramill.registry import Registry, api_keys, datasets, tenants
from loramill.registry.database.tables import TableBase


@pytest.fixture
def acme(registry):
    with registry.writing() as session:
        return tenants.create(session, "acme")


def test_tenants_are_unique_and_listed_by_name(registry, acme):
    with registry.writing() as session:
        with pytest.raises(Conflict, match="'acme'"):
            tenants.create(session, "acme")
        tenants.create(session, "aachen")
    with registry.reading() as session:
        assert [tenant.name for tenant in tenants.list_tenants(session)] == ["aachen", "acme"]
        assert tenants.get(session, "acme") == acme
        with pytest.raises(NotFound):
            tenants.get(session, "nobody")


def test_a_tenants_name_is_checked(registry):
    with registry.writing() as session, pytest.raises(InvalidRequest, match="Not a name"):
        tenants.create(session, "Not a name")


def test_a_key_is_valid_until_it_is_revoked(registry, acme):
    with registry.writing() as session:
        key, secret = api_keys.create(session, "acme")
        admin, _ = api_keys.create(session, None)
    assert secret.startswith("lm-") and key.hint == secret[-4:]
    with registry.reading() as session:
        assert api_keys.authenticate(session, secret) == key
        assert api_keys.list_keys(session, "acme") == [key]
        assert api_keys.list_keys(session, None) == [key, admin]
        for wrong in ("", "lm-", secret[:-1], secret.upper()):
            with pytest.raises(Unauthenticated):
                api_keys.authenticate(session, wrong)
    with registry.writing() as session:
        revoked = api_keys.revoke(session, key.id)
        assert api_keys.revoke(session, key.id) == revoked
        with pytest.raises(Unauthenticated):
            api_keys.authenticate(session, secret)
        with pytest.raises(NotFound):
            api_keys.revoke(session, "key-0")
        assert api_keys.get(session, key.id).revoked_at is not None


def test_a_key_needs_its_tenant(registry):
    with registry.writing() as session, pytest.raises(NotFound):
        api_keys.create(session, "nobody")


def test_a_secret_is_stored_nowhere(registry, acme, database_url, tmp_path):
    with registry.writing() as session:
        _, secret = api_keys.create(session, "acme")
    with registry.reading() as session:
        stored = [str(row) for table in TableBase.metadata.sorted_tables for row in session.execute(table.select())]
    assert any(hashlib.sha256(secret.encode()).hexdigest() in row for row in stored)
    assert not any(secret in row or secret.removeprefix("lm-") in row for row in stored)
    for path in tmp_path.glob("loramill.db*"):
        assert secret.encode() not in path.read_bytes()


def test_a_dataset_of_another_tenant_does_not_exist(registry, acme):
    with registry.writing() as session:
        tenants.create(session, "globex")
        made = datasets.create(session, "acme", "train.jsonl", "a" * 64, 1234, 12)
    assert made.id.startswith("file-")
    with registry.reading() as session:
        assert datasets.get(session, made.id) == datasets.get(session, made.id, tenant="acme") == made
        with pytest.raises(NotFound) as foreign:
            datasets.get(session, made.id, tenant="globex")
        with pytest.raises(NotFound) as unknown:
            datasets.get(session, "file-0", tenant="globex")
        assert foreign.value.message.replace(made.id, "X") == unknown.value.message.replace("file-0", "X")
        assert datasets.list_datasets(session, "globex") == []
        with pytest.raises(NotFound):
            datasets.list_datasets(session, "globex", after=made.id)


def test_datasets_are_listed_in_pages_newest_first(registry, acme):
    with registry.writing() as session:
        made = [datasets.create(session, "acme", f"{i}.jsonl", "a" * 64, i, i) for i in range(5)]
    with registry.reading() as session:
        first = datasets.list_datasets(session, "acme", limit=2)
        second = datasets.list_datasets(session, "acme", after=first[-1].id, limit=9)
    assert first + second == made[::-1]


def test_a_reader_cannot_write_and_a_failed_writer_leaves_nothing(registry: Registry, acme):
    with pytest.raises(Exception, match=r"read-only|cannot be used"), registry.reading() as session:
        tenants.create(session, "globex")
    with pytest.raises(ZeroDivisionError), registry.writing() as session:
        tenants.create(session, "globex")
        raise ZeroDivisionError
    with registry.reading() as session:
        assert [tenant.name for tenant in tenants.list_tenants(session)] == ["acme"]


def test_a_reader_sees_one_snapshot(registry, acme):
    with registry.reading() as reader:
        before = tenants.list_tenants(reader)
        with registry.writing() as session:
            tenants.create(session, "globex")
        assert tenants.list_tenants(reader) == before


def test_foreign_keys_hold(registry, acme):
    with pytest.raises(Conflict, match="deleted in the meantime"), registry.writing() as session:
        session.execute(text("INSERT INTO datasets VALUES ('file-1', 'nobody', 'f', 'a', 1, 1, 1.0)"))


def test_sqlite_is_in_wal_mode_and_synchronous(registry, database_url):
    if not database_url.startswith("sqlite"):
        pytest.skip("about SQLite")
    with registry.reading() as session:
        assert session.scalar(text("PRAGMA journal_mode")) == "wal"
        assert session.scalar(text("PRAGMA synchronous")) == 2
        assert session.scalar(text("PRAGMA busy_timeout")) == 30_000
    with sqlite3.connect(Path(database_url.removeprefix("sqlite:///"))) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
