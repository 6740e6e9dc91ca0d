"""Database engines: SQLite in WAL mode, or PostgreSQL, with errors that say how to fix them.

On SQLite the transaction of a writer is exclusive (BEGIN IMMEDIATE), so that it waits instead of failing halfway. On
both databases a reader sees one snapshot and cannot write.
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
#: For PostgreSQL: a server that disappeared is noticed after 25 s instead of the kernel's two hours.
_CONNECT: Mapping[str, Any] = {
    "connect_timeout": 10,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 25_000,
}
#: Minimum time between two equal log lines, and the time at which each was last written.
_LOG_SECONDS = 10.0
_LAST_LOGGED: dict[str, float] = {}
_WRITING = "loramill_writing"
# SQLSTATE classes: connection, resources, login, unknown database, intervention (a shutdown, a cancelled statement).
_UNREACHABLE = ("08", "53", "28", "3D", "57")


def parse_url(text: str) -> URL:
    """Reads a database URL; SQLite's path becomes absolute, PostgreSQL's driver psycopg 3.

    Raises:
        DatabaseUnusable: the text is not the URL of a supported database.
    """
    try:
        url = make_url(text)
    except ArgumentError as error:
        raise DatabaseUnusable(
            "database_url is not a valid URL; write sqlite:////folder/loramill.db or postgresql://user@host/name."
        ) from error
    kind = url.get_backend_name()
    if kind in ("postgresql", "postgres"):
        return url.set(drivername="postgresql+psycopg")
    if kind != "sqlite":
        raise DatabaseUnusable(f"loramill stores its data in SQLite or PostgreSQL, not in '{kind}': set database_url.")
    if url.database in (None, "", ":memory:"):
        raise DatabaseUnusable(
            "The database must outlive the process: set database_url to a file, not to a database in memory."
        )
    # Absolute, because a Ray worker that gets this URL has a different working folder.
    return url.set(database=str(Path(str(url.database)).expanduser().absolute()))


def redacted_url(url: URL) -> str:
    """Returns the URL without its password, for messages."""
    return str(url.database) if url.get_backend_name() == "sqlite" else url.render_as_string(hide_password=True)


def make_engine(url: URL) -> Engine:
    """Creates an engine for a parsed URL, without connecting.

    Raises:
        DatabaseUnusable: PostgreSQL's driver is not installed.
    """
    # NaN is not JSON: PostgreSQL refuses it, so SQLite has to refuse it as well.
    # Parameters of a failed statement may be prompts, which are never logged.
    options: dict[str, Any] = {"json_serializer": partial(json.dumps, allow_nan=False), "hide_parameters": True}
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
    # pysqlite's own transaction handling would begin too late and end before DDL; `_begin_sqlite` replaces it.
    connection.isolation_level = None
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("PRAGMA synchronous = FULL")


def _begin_sqlite(connection: Connection) -> None:
    writing = connection.get_execution_options().get(_WRITING, False)
    connection.exec_driver_sql(f"PRAGMA query_only = {'OFF' if writing else 'ON'}")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writing else "BEGIN")


def for_reading(engine: Engine) -> Engine:
    """Returns the engine with read-only transactions on one snapshot."""
    if engine.dialect.name == "sqlite":
        return engine
    return engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)


def for_writing(engine: Engine) -> Engine:
    """Returns the engine with transactions that may write."""
    return engine.execution_options(**{_WRITING: True})


#: Messages for users, such as over HTTP; the database's address and the driver's message are only logged.
_PUBLIC: Mapping[type[LoramillError], str] = {
    Unavailable: "The database does not respond; try again in a moment.",
    DiskFull: "The disk of the database is full; free some space and try again.",
    DatabaseUnusable: "The database cannot be used; the server's log says why.",
}


@contextmanager
def translate_db_errors(url: URL, *, opening: bool = False) -> Iterator[None]:
    """Translates a driver's errors that a user can fix into loramill's; other errors pass unchanged.

    Args:
        opening: whether the database is being opened. The message is then for the operator and contains the database's
            address and the driver's message, which are otherwise only logged.

    Raises:
        DatabaseUnusable, DiskFull, Unavailable: the database failed.
        Conflict: a written row refers to one that another transaction deleted.
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
    if opening or type(error) not in _PUBLIC:  # a Conflict contains no details of the database
        return error
    _log_throttled(error.message)
    return type(error)(_PUBLIC[type(error)])


def _log_throttled(message: str) -> None:
    """Logs a message at most once in ten seconds: in an outage, every heartbeat and every request has the same one."""
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
                f"{path} is not an SQLite database or is damaged ({error}); it was left unchanged. "
                "Restore it from a backup, or move it away and run `loramill up` to create an empty database."
            )
        case sqlite3.SQLITE_CANTOPEN | sqlite3.SQLITE_READONLY | sqlite3.SQLITE_PERM | sqlite3.SQLITE_IOERR:
            return DatabaseUnusable(
                f"The database {path} cannot be opened, read or written ({error}); "
                "check that it is a file, that its folder is writable, and that the disk works."
            )
    return None


def _reference_conflict() -> LoramillError:
    return Conflict(
        "This refers to something that was deleted in the meantime, or is still in use; nothing was changed."
    )


def _translate_postgresql(error: BaseException | None, where: str, opening: bool) -> LoramillError | None:
    state: str | None = getattr(error, "sqlstate", None)
    reason = " ".join(str(error).split())
    if state == "53100":
        return DiskFull(f"The disk of the server of {where} is full; free some space and try again.")
    if state in ("40001", "40P01", "55P03"):
        return Unavailable(f"Another transaction at {where} was in conflict; try again.")
    if state == "23503":
        return _reference_conflict()
    if state == "42501":
        return DatabaseUnusable(f"The user of {where} lacks a privilege ({reason}); grant it.")
    # libpq's own failures, such as a refused connection, carry no SQLSTATE.
    unreachable = type(error).__name__ == "OperationalError" if state is None else state.startswith(_UNREACHABLE)
    if unreachable and opening:
        return DatabaseUnusable(
            f"The PostgreSQL database {where} cannot be reached ({reason}); start the server or correct database_url."
        )
    return Unavailable(f"The connection to {where} was lost ({reason}); try again.") if unreachable else None
