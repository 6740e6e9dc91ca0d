"""An artifact's manifest: its files with their hashes, and how these make the artifact's own hash."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from loramill.errors import ArtifactCorrupt, InvalidRequest

MANIFEST = "manifest.json"
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}")
_HASH = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class ManifestEntry:
    """One file: sha256 of its content in hex, and its size in bytes."""

    sha256: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """The files of an artifact, by name."""

    files: Mapping[str, ManifestEntry]

    @property
    def hash(self) -> str:
        """The artifact's hash: sha256 over its files' `name, sha256, size` lines, sorted."""
        lines = (f"{name}\t{entry.sha256}\t{entry.bytes}\n" for name, entry in sorted(self.files.items()))
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(entry.bytes for entry in self.files.values())

    def dump(self) -> bytes:
        """The manifest's file."""
        files = {name: {"sha256": entry.sha256, "bytes": entry.bytes} for name, entry in sorted(self.files.items())}
        return json.dumps({"files": files}, indent=1).encode()

    @classmethod
    def parse(cls, raw: bytes, location: str, artifact: str) -> Manifest:
        """Reads the manifest's file of an artifact that lies at `where`.

        Raises:
            ArtifactCorrupt: it isn't the one of this artifact.
        """
        try:
            files = json.loads(raw)["files"]
            manifest = cls({check_name(name): ManifestEntry(it["sha256"], it["bytes"]) for name, it in files.items()})
        except (ValueError, KeyError, TypeError, AttributeError, InvalidRequest) as error:
            raise corrupt(location, MANIFEST) from error
        if manifest.hash != artifact:
            raise corrupt(location, MANIFEST)
        return manifest

    def check(self, name: str, found: ManifestEntry, location: str) -> None:
        """Raises ArtifactCorrupt unless a file has the content that it had when it was stored."""
        if self.files[name] != found:
            raise corrupt(location, name)


def check_name(name: str) -> str:
    """Returns a file's name if an artifact may have it: one plain part of a path, on any system.

    Raises:
        InvalidRequest: it may not.
    """
    if not _NAME.fullmatch(name) or ".." in name or name == MANIFEST:
        raise InvalidRequest(
            f"{name!r} can't be a file of an artifact: use letters, digits, '.', '_' and '-' only, no '..', "
            f"not beginning with '.', and not '{MANIFEST}'."
        )
    return name


def corrupt(location: str, name: str) -> ArtifactCorrupt:
    """The error for a file that was altered, cut off or lost after it was stored."""
    return ArtifactCorrupt(
        f"The file {name} of the artifact at {location} isn't what was stored there: the disk or another program "
        "altered "
        "it. Restore it from a backup, or run the job again (upload the file again): that mends it."
    )


def is_hash(text: str) -> bool:
    """Whether this can be the hash of an artifact."""
    return _HASH.fullmatch(text) is not None


def digest_and_size(source: bytes | Path) -> ManifestEntry:
    """Hash and size of a file's content."""
    if isinstance(source, bytes):
        return ManifestEntry(hashlib.sha256(source).hexdigest(), len(source))
    with source.open("rb") as file:
        return ManifestEntry(hashlib.file_digest(file, "sha256").hexdigest(), file.tell())
