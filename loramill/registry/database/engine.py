"""Engines and sessions: SQLite in WAL mode or PostgreSQL, with errors that say how to mend them.

A writer's transaction is exclusive on SQLite (BEGIN IMMEDIATE), so it waits instead of failing half-way; a
reader sees one snapshot on both databases and can't write.
"""

from __future__ import annotations

import json
import logging
import math
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from loramill.errors import Conflict, DatabaseUnusable, DiskFull, LoramillError, Unavailable

log = logging.getLogger(__name__)

BUSY_SECONDS = 30
#: For PostgreSQL: a server that vanished is noticed after 25 s, not after the kernel's two hours.
_CONNECT: Mapping[str, Any] = {
    "connect_timeout": 10,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 25_000,
}
#: Seconds between two log lines that are the same, and when each was last written.
_LOG_SECONDS = 10.0
_LAST_LOGGED: dict[str, float] = {}
_WRITING = "loramill_writing"
# SQLSTATE classes: connection, resources, login, unknown database, shutdown.
_UNREACHABLE = ("08", "53", "28", "3D", "57P")


def parse_url(text: str) -> URL:
    """Reads a database URL; SQLite's path becomes absolute, PostgreSQL's driver psycopg 3.

    Raises:
        DatabaseUnusable: the text is no URL of a database that loramill can use.
    """
    try:
        url = make_url(text)
    except ArgumentError as error:
        raise DatabaseUnusable(
            "database_url can't be read as a URL; write sqlite:////folder/loramill.db or postgresql://user@host/name."
        ) from error
    kind = url.get_backend_name()
    if kind in ("postgresql", "postgres"):
        return url.set(drivername="postgresql+psycopg")
    if kind != "sqlite":
        raise DatabaseUnusable(f"loramill keeps its record in SQLite or PostgreSQL, not in '{kind}': set database_url.")
    if url.database in (None, "", ":memory:"):
        raise DatabaseUnusable(
            "The record must outlive the process: give database_url a file, not a database in memory."
        )
    # Absolute, because a Ray worker that gets this URL has another working folder.
    return url.set(database=str(Path(str(url.database)).expanduser().absolute()))


def redacted_url(url: URL) -> str:
    """How a message names the database: never with its password."""
    return str(url.database) if url.get_backend_name() == "sqlite" else url.render_as_string(hide_password=True)


def make_engine(url: URL) -> Engine:
    """An engine for a parsed URL; connects to nothing yet.

    Raises:
        DatabaseUnusable: PostgreSQL's driver isn't installed.
    """
    # NaN isn't JSON: PostgreSQL refuses it, so SQLite has to as well.
    options: dict[str, Any] = {"json_serializer": partial(json.dumps, allow_nan=False)}
    if url.get_backend_name() == "sqlite":
        engine = create_engine(url, connect_args={"timeout": BUSY_SECONDS}, max_overflow=-1, **options)
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
        return engine
    try:
        return create_engine(url, connect_args=dict(_CONNECT), pool_pre_ping=True, **options)
    except ModuleNotFoundError as error:
        raise DatabaseUnusable("PostgreSQL needs the driver psycopg: pip install 'loramill[postgres]'.") from error


def _prepare_sqlite(connection: sqlite3.Connection, _record: object) -> None:
    # pysqlite's own transaction handling would begin too late and end around DDL; "begin" below does it instead.
    connection.isolation_level = None
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("PRAGMA synchronous = FULL")


def _begin_sqlite(connection: Connection) -> None:
    writing = connection.get_execution_options().get(_WRITING, False)
    connection.exec_driver_sql(f"PRAGMA query_only = {'OFF' if writing else 'ON'}")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writing else "BEGIN")


def for_reading(engine: Engine) -> Engine:
    """The same engine, its transactions read-only snapshots."""
    if engine.dialect.name == "sqlite":
        return engine
    return engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)


def for_writing(engine: Engine) -> Engine:
    """The same engine, its transactions those of a writer."""
    return engine.execution_options(**{_WRITING: True})


#: Messages for users, over HTTP for example; the database's address and the driver's message are only logged.
_PUBLIC: Mapping[type[LoramillError], str] = {
    Unavailable: "The database does not answer just now; try again in a moment.",
    DiskFull: "The disk of the database is full; free some space and try again.",
    DatabaseUnusable: "The database can't be used; the server's log says why.",
}


@contextmanager
def translate_db_errors(url: URL, *, opening: bool = False) -> Iterator[None]:
    """Turns a driver's errors that a user can mend into loramill's; every other error passes as it is.

    Args:
        opening: the database is being opened, so that the message is for the operator and has its address and the
            driver's message. Otherwise these are only logged.

    Raises:
        DatabaseUnusable, DiskFull, Unavailable: as their names say.
        Conflict: what was written refers to something that another transaction deleted.
    """
    try:
        yield
    except PoolTimeout as error:
        raise _public(Unavailable(f"Every connection to {redacted_url(url)} is in use; try again."), opening) from error
    except (DBAPIError, sqlite3.Error) as error:
        cause = error.orig if isinstance(error, DBAPIError) else error
        if isinstance(cause, sqlite3.Error):
            known = _translate_sqlite(cause, redacted_url(url))
        else:
            known = _translate_postgresql(cause, redacted_url(url), opening)
        if known is None:
            raise
        raise _public(known, opening) from error


def _public(error: LoramillError, opening: bool) -> LoramillError:
    if opening or type(error) not in _PUBLIC:  # a Conflict names nothing of the database
        return error
    _log_throttled(error.message)
    return type(error)(_PUBLIC[type(error)])


def _log_throttled(message: str) -> None:
    """Logs a message once in ten seconds: in an outage, each heartbeat and each request has the same one."""
    now = time.monotonic()
    if now - _LAST_LOGGED.get(message, -math.inf) < _LOG_SECONDS:
        return
    _LAST_LOGGED.clear()
    _LAST_LOGGED[message] = now
    log.warning("%s", message)


def _translate_sqlite(error: sqlite3.Error, path: str) -> LoramillError | None:
    code = getattr(error, "sqlite_errorcode", None) or sqlite3.SQLITE_OK
    if code == sqlite3.SQLITE_CONSTRAINT_FOREIGNKEY:
        return _reference_conflict()
    match code & 0xFF:
        case sqlite3.SQLITE_FULL:
            return DiskFull(f"The disk of the database {path} is full; free some space and try again.")
        case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
            return Unavailable(f"The database {path} has been locked for {BUSY_SECONDS} s; try again.")
        case sqlite3.SQLITE_NOTADB | sqlite3.SQLITE_CORRUPT:
            return DatabaseUnusable(
                f"{path} is no SQLite database or is damaged ({error}); it was left as it is. "
                "Restore it from a backup, or move it away and run `loramill up` for an empty record."
            )
        case sqlite3.SQLITE_CANTOPEN | sqlite3.SQLITE_READONLY | sqlite3.SQLITE_PERM | sqlite3.SQLITE_IOERR:
            return DatabaseUnusable(
                f"The database {path} can't be opened, read or written ({error}); "
                "make sure that it is a file, that its folder is writable, and that the disk is sound."
            )
    return None


def _reference_conflict() -> LoramillError:
    return Conflict("This refers to something that was deleted meanwhile, or is still in use; nothing was changed.")


def _translate_postgresql(error: BaseException | None, where: str, opening: bool) -> LoramillError | None:
    state: str | None = getattr(error, "sqlstate", None)
    reason = " ".join(str(error).split())
    if state == "53100":
        return DiskFull(f"The disk of the server of {where} is full; free some space and try again.")
    if state in ("40001", "40P01", "55P03"):
        return Unavailable(f"Another transaction was in the way at {where}; try again.")
    if state == "23503":
        return _reference_conflict()
    if state == "42501":
        return DatabaseUnusable(f"The user of {where} lacks a privilege ({reason}); grant it.")
    # libpq's own failures, such as a refused connection, carry no SQLSTATE.
    unreachable = type(error).__name__ == "OperationalError" if state is None else state.startswith(_UNREACHABLE)
    if unreachable and opening:
        return DatabaseUnusable(
            f"The PostgreSQL database {where} can't be reached ({reason}); start the server or correct database_url."
        )
    return Unavailable(f"The connection to {where} was lost ({reason}); try again.") if unreachable else None
