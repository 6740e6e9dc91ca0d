"""Reads files: decompresses their bytes and decodes their text."""

from __future__ import annotations

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

from loramill.data.filetype import describe_kind, detect_kind
from loramill.data.jsonl import decode
from loramill.errors import DatasetInvalid, InvalidRequest

#: Suffixes that describe only the compression of a file.
_PACKED = (".gz", ".zst", ".bz2", ".xz")


def read_bytes(path: Path) -> bytes:
    """A file's content, decompressed if necessary.

    Raises:
        InvalidRequest: it can't be read.
        DatasetInvalid: it is compressed and damaged.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InvalidRequest(f"{path} can't be read: {error.strerror}.") from error
    kind = detect_kind(raw)
    unpack = _UNPACK.get(kind or "")
    if unpack is None:
        return raw
    try:
        return unpack(raw)
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        raise DatasetInvalid(
            f"{path.name} is {describe_kind(kind or '')}, and damaged: {error}. Copy it again."
        ) from error


def inner_suffix(path: Path) -> str:
    """The suffix of a file's content: `.csv` for x.CSV.gz."""
    name = path.with_suffix("") if path.suffix.lower() in _PACKED else path
    return name.suffix.lower()


def text_of(name: str, raw: bytes) -> str:
    """Text in UTF-8, or in UTF-16 with a byte order mark, which spreadsheets write as "Unicode text".

    Raises:
        DatasetInvalid: it is neither.
    """
    if detect_kind(raw) == "utf-16" and raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        try:
            return raw.decode("utf-16")
        except UnicodeDecodeError as error:
            raise DatasetInvalid(f"{name} begins like UTF-16 but is not: {error.reason}; save it as UTF-8.") from error
    try:
        return decode(raw).removeprefix("\ufeff")
    except DatasetInvalid as error:
        raise DatasetInvalid(f"{name}: {error.message}") from error


def _zstd(raw: bytes) -> bytes:
    import pyarrow

    with pyarrow.CompressedInputStream(pyarrow.BufferReader(raw), "zstd") as stream:
        content: bytes = stream.read()
    return content


_UNPACK: Mapping[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.decompress,
    "bzip2": bz2.decompress,
    "xz": lzma.decompress,
    "zstd": _zstd,
}
