"""The artifact store: immutable sets of files, named by the hash of their content."""

from __future__ import annotations

import errno
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote, urlsplit

from loramill.errors import ArtifactMissing, DiskFull, InvalidRequest, StoreUnusable
from loramill.registry.artifacts.local import LocalArtifacts
from loramill.registry.artifacts.remote import RemoteArtifacts
from loramill.storage.manifest import MANIFEST, Manifest, check_name, corrupt, digest_and_size, is_hash
from loramill.storage.object_store import redacted_url, translate_store_errors

_ACCESS_ERRNOS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)


class ArtifactStore:
    """Artifacts at an fsspec URL: `file:///folder` (or a plain path), or a URL such as `s3://bucket/folder`.

    An artifact exists completely or not at all, whenever a process is killed; every read checks the content against
    the hash. Safe to use from several threads and processes.

    Args:
        url: URL of the artifacts.
        cache: folder for copies of artifacts that are not on this machine; it can be deleted at any time.

    Raises:
        SetupError: no installed backend can open the URL.
    """

    def __init__(self, url: str, cache: Path = Path("~/.cache/loramill/artifacts")) -> None:
        parts = urlsplit(url)
        local = unquote(parts.path) if parts.scheme == "file" else None if "://" in url else url
        self.url = url
        self._backend = (
            RemoteArtifacts(url, LocalArtifacts(cache.expanduser()))
            if local is None
            else LocalArtifacts(Path(local).absolute())
        )

    def put(self, files: Mapping[str, bytes | Path]) -> str:
        """Stores files and returns the artifact's hash.

        Record the hash only after this returns. The same files give the same hash, and storing them again changes
        nothing.

        Args:
            files: by name, the content or the path of a file to copy.

        Raises:
            InvalidRequest: there are no files, or a name is not valid for a file of an artifact.
            DiskFull: there is too little space; nothing was stored.
            Unavailable: the store does not respond.
            StoreUnusable: the store refuses access.
        """
        if not files:
            raise InvalidRequest("An artifact needs at least one file.")
        with self._translate_errors():
            return self._backend.write({check_name(name): source for name, source in files.items()})

    def fetch(self, artifact: str) -> Path:
        """Returns a local folder with the artifact's files, whose content is checked; it must not be written to.

        Raises:
            ArtifactMissing: the artifact is not in the store.
            ArtifactCorrupt: a file is missing, or its content differs from what was stored.
            Unavailable, StoreUnusable: as in `put`.
        """
        with self._translate_errors(artifact):
            return self._backend.fetch(artifact)

    def read(self, artifact: str, name: str) -> bytes:
        """Returns the content of one file, which is checked.

        Raises:
            ArtifactMissing: the artifact is not in the store, or has no such file.
            ArtifactCorrupt: the file is missing, or its content differs from what was stored.
            Unavailable, StoreUnusable: as in `put`.
        """
        with self.open(artifact, name) as file, self._translate_errors(artifact):
            content = file.read()
        self.manifest(artifact).check(name, digest_and_size(content), self._backend.location(artifact))
        return content

    def open(self, artifact: str, name: str) -> BinaryIO:
        """Opens one file, whose content is not checked; the reader has to compare it with the manifest.

        Raises:
            ArtifactMissing: the artifact is not in the store, or has no such file.
            ArtifactCorrupt: the file is missing.
            Unavailable, StoreUnusable: as in `put`.
        """
        files = self.manifest(artifact).files
        if name not in files:
            raise ArtifactMissing(f"The artifact {artifact} has no file '{name}', only {', '.join(files)}.")
        with self._translate_errors(artifact):
            try:
                with translate_store_errors(self.url):
                    return self._backend.open(artifact, name)
            except FileNotFoundError as error:
                raise corrupt(self._backend.location(artifact), name) from error

    def size(self, artifact: str) -> int:
        """Returns the total size of the artifact's files in bytes.

        Raises:
            ArtifactMissing, ArtifactCorrupt: as in `read`.
        """
        return self.manifest(artifact).size

    def manifest(self, artifact: str) -> Manifest:
        """Returns the artifact's files with their hashes.

        Raises:
            ArtifactMissing, ArtifactCorrupt: as in `fetch`.
        """
        with self._translate_errors(artifact), self._backend.open(artifact, MANIFEST) as file:
            return Manifest.parse(file.read(), self._backend.location(artifact), artifact)

    def remove_unreferenced(self, known: Collection[str], older_than: float) -> int:
        """Deletes artifacts that are not `known`, and leftovers of crashes.

        Args:
            older_than: minimum age in seconds; more than the longest time between a `put` and recording its hash.

        Returns:
            The number of artifacts and leftovers that were deleted.
        """
        with self._translate_errors():
            return self._backend.remove_unreferenced(known, older_than)

    @contextmanager
    def _translate_errors(self, artifact: str | None = None) -> Iterator[None]:
        missing = ArtifactMissing(
            f"The artifact {artifact} is not at {redacted_url(self.url)}: restore it from a backup, or create it again."
        )
        if artifact is not None and not is_hash(artifact):
            raise missing
        try:
            with translate_store_errors(self.url):
                yield
        except FileNotFoundError as error:
            if artifact is None:
                raise
            raise missing from error
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise DiskFull(
                    f"The disk of the artifacts at {redacted_url(self.url)} is full; free some space and try again."
                ) from error
            if error.errno in _ACCESS_ERRNOS:
                raise StoreUnusable(
                    f"The artifacts at {redacted_url(self.url)} cannot be read or written ({error.strerror}); "
                    "make it a folder that you may write to, or correct artifacts_url."
                ) from error
            raise
