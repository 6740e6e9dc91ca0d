"""Stores a job's checkpoints: in a folder of this machine, or at an fsspec URL."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

from loramill.errors import ArtifactCorrupt, DiskFull, StoreUnusable
from loramill.storage.atomic import fsync
from loramill.storage.object_store import open_filesystem, redacted_url, translate_store_errors


class CheckpointStore(Protocol):
    """Files by name, each complete or absent.

    Every method raises Unavailable if the store does not answer, and StoreUnusable if it denies access.
    """

    location: str

    def names(self) -> list[str]:
        """Returns the names of the files; none if the folder does not exist."""

    def read(self, name: str) -> bytes:
        """Returns a file's content.

        Raises:
            ArtifactCorrupt: it can't be read.
        """

    def write(self, name: str, content: bytes) -> None:
        """Stores a file.

        Raises:
            DiskFull: no space for it.
        """

    def remove(self, name: str) -> None:
        """Removes a file, if it exists."""


def open_checkpoint_store(location: Path | str) -> CheckpointStore:
    """Opens the store at a path or URL.

    Raises:
        SetupError: no installed package can open such a URL.
    """
    parts = urlsplit(str(location))
    if isinstance(location, str) and parts.scheme == "file":
        return _FolderStore(Path(unquote(parts.path)))
    if isinstance(location, Path) or "://" not in location:
        return _FolderStore(Path(location))
    return _RemoteStore(location)


class _FolderStore:
    """A folder; a file is written under another name, synced and renamed."""

    def __init__(self, folder: Path) -> None:
        self._folder, self.location = folder, str(folder)

    def names(self) -> list[str]:
        with translate_store_errors(self.location):
            return [file.name for file in self._folder.iterdir()] if self._folder.is_dir() else []

    def read(self, name: str) -> bytes:
        with _translate_read_errors(self.location, name):
            return (self._folder / name).read_bytes()

    def write(self, name: str, content: bytes) -> None:
        with _translate_disk_full(content, self.location):
            self._folder.mkdir(parents=True, exist_ok=True)
            _write_atomically(self._folder / name, content)

    def remove(self, name: str) -> None:
        with translate_store_errors(self.location):
            (self._folder / name).unlink(missing_ok=True)


class _RemoteStore:
    """A file system of fsspec that shows a file only when it is complete."""

    def __init__(self, url: str) -> None:
        files, root = open_filesystem(url)
        self._files, self._root, self.location = files, root.rstrip("/"), redacted_url(url)

    def names(self) -> list[str]:
        self._files.invalidate_cache(self._root)
        try:
            with translate_store_errors(self.location):
                return [path.rpartition("/")[2] for path in self._files.ls(self._root, detail=False)]
        except FileNotFoundError:
            return []

    def read(self, name: str) -> bytes:
        with _translate_read_errors(self.location, name):
            return bytes(self._files.cat_file(f"{self._root}/{name}"))

    def write(self, name: str, content: bytes) -> None:
        with _translate_disk_full(content, self.location):
            try:
                with translate_store_errors(self.location):
                    self._files.pipe_file(f"{self._root}/{name}", content)
            except FileNotFoundError:  # unlike buckets, some stores have folders, and this is the first file
                self._files.makedirs(self._root, exist_ok=True)
                self._files.pipe_file(f"{self._root}/{name}", content)

    def remove(self, name: str) -> None:
        with translate_store_errors(self.location):
            if self._files.exists(f"{self._root}/{name}"):
                self._files.rm_file(f"{self._root}/{name}")


def delete_all(location: Path | str) -> None:
    """Removes a store with all of its files.

    Raises:
        Unavailable: the store does not answer.
        StoreUnusable: it denies access.
    """
    files, root = open_filesystem(str(location))
    with translate_store_errors(str(location)):
        if files.exists(root):
            files.rm(root, recursive=True)


@contextmanager
def _translate_read_errors(location: str, name: str) -> Iterator[None]:
    try:
        with translate_store_errors(location):
            yield
    except PermissionError as error:
        raise StoreUnusable(
            f"The checkpoints in {location} can't be read ({error.strerror}): grant read permission."
        ) from error
    except OSError as error:
        raise ArtifactCorrupt(
            f"The checkpoint {name} in {location} can't be read ({error}): check the disk."
        ) from error


@contextmanager
def _translate_disk_full(content: bytes, location: str) -> Iterator[None]:
    try:
        with translate_store_errors(location):
            yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DiskFull(
            f"No space for a checkpoint of {len(content) / 1e6:.0f} MB in {location}: free some space; "
            "the job resumes at the checkpoint before."
        ) from error


def _write_atomically(file: Path, content: bytes) -> None:
    descriptor, partial = tempfile.mkstemp(dir=file.parent, suffix=".partial")
    try:
        with os.fdopen(descriptor, "wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        Path(partial).replace(file)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise
    fsync(file.parent)
