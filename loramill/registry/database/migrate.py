"""Migrates a database, and checks that it is at the newest migration.

This works from an installed wheel: there is no alembic.ini, and Alembic finds the migrations by package.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import URL, Connection, Engine, inspect

from loramill.errors import DatabaseUnusable
from loramill.registry.database.engine import (
    for_reading,
    for_writing,
    make_engine,
    parse_url,
    redacted_url,
    translate_db_errors,
)

# Any number that other programs do not lock; it has to be the same in all processes.
_POSTGRESQL_LOCK = 7_242_081_965


def migrate(database_url: str) -> None:
    """Creates the database's tables, or migrates them to the newest migration; safe to call from two processes.

    A missing SQLite file is created with its folder. A damaged database, or one of another program, is left unchanged.

    Raises:
        DatabaseUnusable: the database cannot be opened or written, is damaged, is newer than this program, or belongs
            to another program.
        DiskFull: there is no space for it.
    """
    url = parse_url(database_url)
    if url.get_backend_name() == "sqlite":
        _prepare_file(url)
    engine = make_engine(url)
    try:
        with translate_db_errors(url, opening=True):
            with for_writing(engine).begin() as connection:
                if engine.dialect.name == "postgresql":
                    connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_POSTGRESQL_LOCK})")
                _upgrade(connection, redacted_url(url))
            if engine.dialect.name == "sqlite":
                # The mode is stored in the file. Set last, so that a file of another program is not altered.
                with closing(engine.raw_connection()) as raw:
                    raw.cursor().execute("PRAGMA journal_mode = WAL")
    finally:
        engine.dispose()


def check_current(engine: Engine) -> None:
    """Raises DatabaseUnusable unless the database can be read and is at this program's newest migration."""
    where = redacted_url(engine.url)
    if engine.dialect.name == "sqlite" and not Path(str(engine.url.database)).exists():
        raise DatabaseUnusable(f"There is no database at {where}: run `loramill up`, which creates it.")
    with translate_db_errors(engine.url, opening=True), for_reading(engine).connect() as connection:
        if not _is_current(connection, where):
            raise DatabaseUnusable(
                f"The database {where} is not at the newest migration: run `loramill up`, which migrates it."
            )


def _upgrade(connection: Connection, where: str) -> None:
    if _is_current(connection, where):
        return
    names = set(inspect(connection).get_table_names())
    if names and "alembic_version" not in names:
        raise DatabaseUnusable(
            f"The database {where} holds tables of another program (such as '{min(names)}') and was left unchanged; "
            "give loramill a database of its own."
        )
    config = _config()
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def _is_current(connection: Connection, where: str) -> bool:
    scripts = ScriptDirectory.from_config(_config())
    found = MigrationContext.configure(connection).get_current_revision()
    if found is not None and found not in {script.revision for script in scripts.walk_revisions()}:
        raise DatabaseUnusable(
            f"The database {where} is at migration '{found}', which is unknown to this loramill, and was left "
            "unchanged: it was written by a newer loramill; upgrade this one."
        )
    return found == scripts.get_current_head()


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", "loramill.registry.database:migrations")
    return config


def _prepare_file(url: URL) -> None:
    path = Path(str(url.database))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DatabaseUnusable(
            f"The folder {path.parent} of the database cannot be created ({error.strerror}); "
            "create it, or set LORAMILL_HOME or database_url to a folder that you may write to."
        ) from error
    if not path.exists():
        return
    # Read-only, since opening a damaged file for writing can already alter it.
    with (
        translate_db_errors(url, opening=True),
        closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as connection,
    ):
        problem = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    if problem != "ok":
        raise DatabaseUnusable(
            f"The database {path} is damaged ({problem}); it was left unchanged. "
            "Restore it from a backup, or move it away and run `loramill up` to create an empty database."
        )
