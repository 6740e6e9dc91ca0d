"""Detects the kind of a file by its first bytes, since names are often wrong."""

from __future__ import annotations

#: First bytes and the kind of file; longer prefixes come first.
_MAGIC = (
    (b"\x1f\x8b", "gzip"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ\x00", "xz"),
    (b"PAR1", "parquet"),
    (b"ARROW1", "arrow"),
    (b"PK\x03\x04", "zip"),
    (b"\xd0\xcf\x11\xe0", "an old Excel or Word file"),
    (b"SQLite format 3\x00", "an SQLite database"),
    (b"%PDF-", "a PDF"),
    (b"\x80\x02", "a Python pickle"),
    (b"\x80\x03", "a Python pickle"),
    (b"\x80\x04", "a Python pickle"),
    (b"\x80\x05", "a Python pickle"),
    (b"\xff\xfe\x00\x00", "utf-32"),
    (b"\x00\x00\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)

#: Descriptions for messages, of kinds that are not descriptions themselves.
_DESCRIPTIONS = {
    "gzip": "compressed by gzip",
    "zstd": "compressed by zstd",
    "bzip2": "compressed by bzip2",
    "xz": "compressed by xz",
    "parquet": "a Parquet file",
    "arrow": "an Arrow file",
    "zip": "a ZIP archive (an .xlsx workbook is one)",
    "utf-16": "text in UTF-16",
    "utf-32": "text in UTF-32",
}


def detect_kind(head: bytes) -> str | None:
    """The kind of a file by its first 16 bytes or more; None: it may be text in UTF-8."""
    found = next((kind for begins, kind in _MAGIC if head.startswith(begins)), None)
    if found is None and len(head) >= 4 and (head[1::2][:2] == b"\0\0") != (head[::2][:2] == b"\0\0"):
        return "utf-16"  # without a byte order mark
    return found


def describe_kind(kind: str) -> str:
    """A kind's description for a message: "it is …"."""
    return _DESCRIPTIONS.get(kind, kind)
