"""Artifacts in a file system of fsspec, such as `s3://bucket/folder`. The manifest is written after the files.

An artifact without a manifest does not exist, so that an interrupted upload is garbage and never half an artifact.
"""

from __future__ import annotations

import tempfile
import time
from collections import defaultdict
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import BinaryIO, cast

from loramill.errors import ArtifactCorrupt
from loramill.registry.artifacts.local import LocalArtifacts
from loramill.storage.manifest import MANIFEST, Manifest, digest_and_size, is_hash
from loramill.storage.object_store import open_filesystem


class RemoteArtifacts:
    """Artifacts that several machines share; fetched artifacts are kept in a local cache."""

    def __init__(self, url: str, cache: LocalArtifacts) -> None:
        self._files, self._root = open_filesystem(url)
        self._cache = cache

    def location(self, artifact: str) -> str:
        """Returns where an artifact is, for messages."""
        return str(self._files.unstrip_protocol(self._path(artifact)))

    def write(self, files: Mapping[str, bytes | Path]) -> str:
        """Stores files and returns the hash of their artifact."""
        manifest = Manifest({name: digest_and_size(source) for name, source in files.items()})
        for name, source in files.items():
            if isinstance(source, bytes):
                self._files.pipe_file(self._path(manifest.hash, name), source)
            else:
                self._files.put_file(str(source), self._path(manifest.hash, name))
        self._files.pipe_file(self._path(manifest.hash, MANIFEST), manifest.dump())
        return manifest.hash

    def open(self, artifact: str, name: str) -> BinaryIO:
        """Opens a file, whose content is not checked; FileNotFoundError if it does not exist."""
        return cast("BinaryIO", self._files.open(self._path(artifact, name), "rb"))

    def fetch(self, artifact: str) -> Path:
        """Returns the folder of a local copy, whose content is checked; FileNotFoundError if it does not exist."""
        try:
            return self._cache.fetch(artifact)
        except (FileNotFoundError, ArtifactCorrupt):
            self._download(artifact)
            return self._cache.fetch(artifact)

    def remove_unreferenced(self, known: Collection[str], older_than: float) -> int:
        """Deletes artifacts that are not known and older than `older_than` seconds, also from this machine's cache.

        Returns:
            The number of artifacts that were deleted from the store.
        """
        self._cache.remove_unreferenced(known, older_than)
        self._files.invalidate_cache()
        newest: defaultdict[str, float] = defaultdict(float)
        for path in self._files.find(self._root):
            artifact = path.split("/")[-2]
            if is_hash(artifact) and artifact not in known:
                newest[artifact] = max(newest[artifact], self._files.modified(path).timestamp())
        old = [artifact for artifact, changed in newest.items() if changed <= time.time() - older_than]
        for artifact in old:
            if self._files.exists(self._path(artifact, MANIFEST)):
                self._files.rm_file(self._path(artifact, MANIFEST))
            self._files.rm(self._path(artifact), recursive=True)
        return len(old)

    def _path(self, artifact: str, *name: str) -> str:
        return "/".join((self._root.rstrip("/"), artifact[:2], artifact, *name))

    def _download(self, artifact: str) -> None:
        with self.open(artifact, MANIFEST) as file:
            manifest = Manifest.parse(file.read(), self.location(artifact), artifact)
        with tempfile.TemporaryDirectory() as folder:
            files = {name: Path(folder) / name for name in manifest.files}
            for name, path in files.items():
                self._files.get_file(self._path(artifact, name), str(path))
                manifest.check(name, digest_and_size(path), self.location(artifact))
            self._cache.write(files)
