"""Artifacts in a local folder: written under a temporary name, fsynced, renamed.

<root>/<first two digits>/<hash>/<files and manifest.json>        <root>/.tmp/<leftovers of crashes>
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import BinaryIO

from loramill.errors import ArtifactCorrupt
from loramill.storage.atomic import fsync
from loramill.storage.manifest import MANIFEST, Manifest, corrupt, digest_and_size, is_hash


class LocalArtifacts:
    """Artifacts in a folder of this machine."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._temporary = root / ".tmp"

    def location(self, artifact: str) -> str:
        """Returns where an artifact is, for messages."""
        return str(self._path(artifact))

    def write(self, files: Mapping[str, bytes | Path]) -> str:
        """Stores files durably and returns the hash of their artifact; replaces a damaged artifact with this hash."""
        building = self._temporary_path()
        try:
            _make_folder(building)
            for name, source in files.items():
                _write_file(building / name, source)
            manifest = Manifest({name: digest_and_size(building / name) for name in files})
            _write_file(building / MANIFEST, manifest.dump())
            fsync(building)
            self._move_into_place(building, manifest)
        except BaseException:
            shutil.rmtree(building, ignore_errors=True)
            raise
        return manifest.hash

    def open(self, artifact: str, name: str) -> BinaryIO:
        """Opens a file, whose content is not checked; FileNotFoundError if it does not exist."""
        return (self._path(artifact) / name).open("rb")

    def fetch(self, artifact: str) -> Path:
        """Returns the folder of an artifact, whose content is checked; FileNotFoundError if it does not exist."""
        folder = self._path(artifact)
        with self.open(artifact, MANIFEST) as file:
            _check(folder, Manifest.parse(file.read(), str(folder), artifact))
        return folder

    def remove_unreferenced(self, known: Collection[str], older_than: float) -> int:
        """Deletes unknown artifacts and leftovers that are older than `older_than` seconds; returns their number."""
        before = time.time() - older_than
        discarded = [path for path in self._temporary.glob("*") if _is_old(path, before)]
        for path in self.root.glob("[0-9a-f][0-9a-f]/*"):
            if is_hash(path.name) and path.name not in known and _is_old(path, before):
                # Renamed first, so that the artifact never exists in part.
                discarded.append(path.rename(self._temporary_path()))
        for path in discarded:
            shutil.rmtree(path)
        return len(discarded)

    def _path(self, artifact: str) -> Path:
        return self.root / artifact[:2] / artifact

    def _temporary_path(self) -> Path:
        _make_folder(self._temporary)
        return self._temporary / secrets.token_hex(16)

    def _move_into_place(self, building: Path, manifest: Manifest) -> None:
        final = self._path(manifest.hash)
        _make_folder(final.parent)
        if final.exists() and not _is_intact(final, manifest):
            final.rename(self._temporary_path())
        try:
            building.rename(final)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            # The same content exists. It counts as new, so that a clean-up does not delete it before it is recorded.
            os.utime(final)
            shutil.rmtree(building)
        fsync(final.parent)


def _is_intact(folder: Path, manifest: Manifest) -> bool:
    try:
        _check(folder, manifest)
        return (folder / MANIFEST).read_bytes() == manifest.dump()
    except (ArtifactCorrupt, FileNotFoundError):
        return False


def _check(folder: Path, manifest: Manifest) -> None:
    for name in manifest.files:
        try:
            found = digest_and_size(folder / name)
        except FileNotFoundError as error:
            raise corrupt(str(folder), name) from error
        manifest.check(name, found, str(folder))


def _is_old(path: Path, before: float) -> bool:
    try:
        return path.stat().st_mtime <= before
    except FileNotFoundError:
        return False  # renamed by the `put` that wrote it


def _make_folder(path: Path) -> None:
    if path.is_dir():
        return
    _make_folder(path.parent)
    path.mkdir(exist_ok=True)
    fsync(path.parent)


def _write_file(path: Path, source: bytes | Path) -> None:
    with path.open("xb") as file:
        if isinstance(source, bytes):
            file.write(source)
        else:
            with source.open("rb") as content:
                shutil.copyfileobj(content, file, 1 << 20)
        file.flush()
        os.fsync(file.fileno())
