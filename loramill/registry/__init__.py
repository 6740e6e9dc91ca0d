"""The registry: tenants, API keys, datasets, jobs, adapters and nightly runs, in a database and an artifact store.

Everything that must outlive a process is stored here. The modules of this package are functions that take a session:

    with registry.writing() as session:
        job = jobs.submit(session, spec, {})
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Engine, select
from sqlalchemy.orm import Session

from loramill.registry.artifacts.store import ArtifactStore
from loramill.registry.database.engine import for_reading, for_writing, make_engine, parse_url, translate_db_errors
from loramill.registry.database.migrate import check_current, migrate
from loramill.registry.database.tables import DatasetRow, EvaluationRow, JobRow, PrunedVersionRow, VersionRow

#: Seconds for which the files of a version stay after retention removed it: requests and jobs that began before may
#: still load them. A request is admitted with a version that was read at most `serve.grace_seconds` (180) before.
PRUNED_GRACE_SECONDS = 3600.0

__all__ = ["ArtifactStore", "Registry", "migrate"]


class Registry:
    """An open registry; picklable, and safe to share between threads.

    Attributes:
        artifacts: content of datasets, versions and evaluations, by hash.
        commit_token: replaced by a new object at each commit through this registry that invalidates caches.
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
            DatabaseUnusable: the database cannot be reached or read, or is not at the newest migration.
            SetupError: the artifact store cannot be used.
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
        """Opens a read-only session on one snapshot of the database.

        Raises:
            DatabaseUnusable, Unavailable: the database failed in the meantime.
        """
        with translate_db_errors(self._engine.url), Session(self._reading) as session:
            yield session

    @contextmanager
    def writing(self, *, invalidate_caches: bool = True) -> Iterator[Session]:
        """Opens a session that commits at the end, and rolls back on an error.

        Args:
            invalidate_caches: whether to replace `commit_token`. False for frequent writes that no one caches, such as
                usage.

        Raises:
            DatabaseUnusable, DiskFull, Unavailable: the database failed in the meantime; nothing was written.
        """
        with translate_db_errors(self._engine.url), Session(self._writing) as session, session.begin():
            yield session
        if invalidate_caches:
            self.commit_token = object()

    def remove_unreferenced(self, older_than: float) -> int:
        """Deletes unreferenced artifacts and leftovers of crashes.

        Args:
            older_than: minimum age in seconds; more than the longest time between `artifacts.put` and the commit that
                refers to the hash.

        Returns:
            The number of artifacts and leftovers that were deleted.
        """
        with self.reading() as session:
            columns = (DatasetRow.artifact, VersionRow.id, JobRow.result, EvaluationRow.results)
            known = {artifact for column in columns for artifact in session.scalars(select(column)) if artifact}
            lately = PrunedVersionRow.pruned_at > time.time() - PRUNED_GRACE_SECONDS
            known.update(session.scalars(select(PrunedVersionRow.version).where(lately)))
        return self.artifacts.remove_unreferenced(known, older_than)

    def close(self) -> None:
        """Closes the connections."""
        self._engine.dispose()
