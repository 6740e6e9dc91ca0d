"""SQLite databases for tests. Migrating one takes 0.12 s of CPU time and hundreds of tests need one: they copy one."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

from sqlalchemy import make_url

from loramill.registry import migrate


def create_sqlite_database(url: str) -> None:
    """Creates a migrated SQLite database, as `migrate` does.

    Raises:
        FileExistsError: It exists already.
    """
    path = Path(str(make_url(url).database))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as file:
        file.write(_migrated())


@cache
def _migrated() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "loramill.db")
        migrate(f"sqlite:///{path}")
        return path.read_bytes()
