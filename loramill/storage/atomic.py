"""Writing files and folders durably and atomically: they survive a power cut, and exist completely or not at all."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loramill.errors import DiskFull, InvalidRequest


def fsync(path: Path) -> None:
    """Waits until a file's content, or the names in a folder, are on disk; a new file needs this for its folder too."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def share(file: Path) -> None:
    """Lets all users read a file that safetensors wrote, which only its owner can read."""
    file.chmod(0o644)


def replace_text(path: Path, text: str, *, mode: int = 0o644) -> None:
    """Replaces the text of a file atomically: readers get the complete old or the complete new text.

    Raises:
        OSError: the file cannot be written; the old text stays.
    """
    building = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        building.touch(mode)
        building.write_text(text, encoding="utf-8")
        fsync(building)
        building.replace(path)
        fsync(path.parent)
    finally:
        building.unlink(missing_ok=True)


@contextmanager
def new_folder(to: Path) -> Iterator[Path]:
    """Yields a folder to write files into, which becomes `to` at the end; after an error nothing is left.

    Raises:
        InvalidRequest: `to` already exists and is not an empty folder, or cannot be created.
        DiskFull: there is too little space.
    """
    to = to.expanduser().absolute()
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise InvalidRequest(f"{to} already exists: name a folder that does not exist.")
    building = to.parent / f".{to.name}.{secrets.token_hex(4)}"
    try:
        building.mkdir(parents=True)
        yield building
        for file in building.iterdir():
            fsync(file)
        fsync(building)
        building.rename(to)
        fsync(to.parent)
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        raise InvalidRequest(f"{to} cannot be written ({error.strerror}): name another folder.") from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DiskFull(
            f"There is no space for {to}: free some, or name another folder. Nothing was written."
        ) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
