"""The manifest of an artifact: its files with their hashes, from which the artifact's hash is computed."""

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
    """One file: SHA-256 of its content in hex, and its size in bytes."""

    sha256: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """The files of an artifact, by name."""

    files: Mapping[str, ManifestEntry]

    @property
    def hash(self) -> str:
        """The artifact's hash: SHA-256 of the sorted lines `name, sha256, size` of its files."""
        lines = (f"{name}\t{entry.sha256}\t{entry.bytes}\n" for name, entry in sorted(self.files.items()))
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    @property
    def size(self) -> int:
        """Total size of the files in bytes."""
        return sum(entry.bytes for entry in self.files.values())

    def dump(self) -> bytes:
        """Returns the content of the manifest's file."""
        files = {name: {"sha256": entry.sha256, "bytes": entry.bytes} for name, entry in sorted(self.files.items())}
        return json.dumps({"files": files}, indent=1).encode()

    @classmethod
    def parse(cls, raw: bytes, location: str, artifact: str) -> Manifest:
        """Parses the manifest's file of the artifact at `location`.

        Raises:
            ArtifactCorrupt: it is not the manifest of this artifact.
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
        """Raises ArtifactCorrupt unless a file still has the content with which it was stored."""
        if self.files[name] != found:
            raise corrupt(location, name)


def check_name(name: str) -> str:
    """Returns the name if it is valid for a file of an artifact: one plain part of a path on any system.

    Raises:
        InvalidRequest: the name is not valid.
    """
    if not _NAME.fullmatch(name) or ".." in name or name == MANIFEST:
        raise InvalidRequest(
            f"{name!r} is not a valid file name in an artifact: use letters, digits, '.', '_' and '-' only, no '..', "
            f"not beginning with '.', and not '{MANIFEST}'."
        )
    return name


def corrupt(location: str, name: str) -> ArtifactCorrupt:
    """Returns the error for a file that was altered, cut short or lost after it was stored."""
    return ArtifactCorrupt(
        f"The file {name} of the artifact at {location} is not what was stored there: the disk or another program "
        "altered it. Restore it from a backup, or repair it by running the job or uploading the file again."
    )


def is_hash(text: str) -> bool:
    """Returns whether the text can be the hash of an artifact."""
    return _HASH.fullmatch(text) is not None


def digest_and_size(source: bytes | Path) -> ManifestEntry:
    """Returns the SHA-256 and the size of a file's content."""
    if isinstance(source, bytes):
        return ManifestEntry(hashlib.sha256(source).hexdigest(), len(source))
    with source.open("rb") as file:
        return ManifestEntry(hashlib.file_digest(file, "sha256").hexdigest(), file.tell())
