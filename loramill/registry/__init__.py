"""The record: tenants, keys, datasets, jobs, adapters, evaluations and nights, in one database and one artifact store.

Everything that must outlive a process is here. The modules beside this one are functions over a session:

    with registry.writing() as session:
        job = jobs.submit(session, spec, {})
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Engine, select
from sqlalchemy.orm import Session

from loramill.registry.artifacts.store import ArtifactStore
from loramill.registry.database.engine import for_reading, for_writing, make_engine, parse_url, translate_db_errors
from loramill.registry.database.migrate import check_current, migrate
from loramill.registry.database.tables import DatasetRow, JobRow, VersionRow

__all__ = ["ArtifactStore", "Registry", "migrate"]


class Registry:
    """An open record; picklable, and safe to share between threads.

    Attributes:
        artifacts: the bytes of datasets and versions, by their hash.
        mark: another object after each noted commit through this registry, by which caches notice it.
    """

    def __init__(self, engine: Engine, artifacts: ArtifactStore) -> None:
        self._engine = engine
        self._reading, self._writing = for_reading(engine), for_writing(engine)
        self.artifacts = artifacts
        self.commit_token = object()

    @classmethod
    def open(cls, database_url: str, artifacts_url: str) -> Registry:
        """Opens a migrated database and its artifact store.

        Raises:
            DatabaseUnusable: it can't be reached or read, or isn't at this program's newest migration.
            SetupError: the artifact store can't be used.
        """
        engine = make_engine(parse_url(database_url))
        try:
            check_current(engine)
        except BaseException:
            engine.dispose()
            raise
        return cls(engine, ArtifactStore(artifacts_url))

    def __reduce__(self) -> tuple[Any, ...]:
        return Registry.open, (self._engine.url.render_as_string(hide_password=False), self.artifacts.url)

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """A session on one snapshot of the record; it can't write.

        Raises:
            DatabaseUnusable, Unavailable: the database failed meanwhile.
        """
        with translate_db_errors(self._engine.url), Session(self._reading) as session:
            yield session

    @contextmanager
    def writing(self, *, invalidate_caches: bool = True) -> Iterator[Session]:
        """A session that commits at the end, and undoes everything on an error.

        Args:
            noted: changes the mark; false for what no one caches, such as usage counts, which are written all the time.

        Raises:
            DatabaseUnusable, DiskFull, Unavailable: the database failed meanwhile; nothing was written.
        """
        with translate_db_errors(self._engine.url), Session(self._writing) as session, session.begin():
            yield session
        if invalidate_caches:
            self.commit_token = object()

    def sweep(self, older_than: float) -> int:
        """Removes artifacts that nothing records, and leftovers of crashes, older than so many seconds.

        Give more than the longest time between `artifacts.put` and recording its hash. Returns how many went.
        """
        with self.reading() as session:
            recorded = (DatasetRow.artifact, VersionRow.id, JobRow.result)
            known = {artifact for column in recorded for artifact in session.scalars(select(column)) if artifact}
        return self.artifacts.sweep(known, older_than)

    def close(self) -> None:
        """Closes the connections."""
        self._engine.dispose()
