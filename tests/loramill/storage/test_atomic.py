"""Files that are replaced while others read them."""

import os
import threading
from pathlib import Path

import pytest

from loramill.storage.atomic import replace_text


def test_a_reader_gets_a_complete_text_at_any_moment(tmp_path: Path) -> None:
    path, done = tmp_path / "address", threading.Event()
    texts = {name * 10_000 for name in "ab"}
    replace_text(path, "a" * 10_000)

    def replace() -> None:
        for _ in range(50):
            for text in sorted(texts):
                replace_text(path, text)
        done.set()

    writer = threading.Thread(target=replace)
    writer.start()
    seen = set()
    while not done.is_set():
        seen.add(path.read_text())
    writer.join()
    assert seen <= texts
    assert list(tmp_path.iterdir()) == [path]


def test_a_secret_is_never_readable_by_others(tmp_path: Path) -> None:
    path = tmp_path / "key"
    replace_text(path, "secret", mode=0o600)
    replace_text(path, "another", mode=0o600)
    assert (path.read_text(), path.stat().st_mode & 0o777) == ("another", 0o600)


def test_a_failed_write_leaves_the_old_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "address"
    replace_text(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        replace_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
