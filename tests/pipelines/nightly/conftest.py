"""The cluster of tests of nightly runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from loramill.data.tokenizer import ChatTokenizer
from loramill.models.catalog import Base
from loramill.pipelines.nightly import run, train
from loramill.registry import (
    Registry,
    tenants,
)
from loramill.settings import Settings

from ...databases import create_sqlite_database
from .cluster import Cluster


@pytest.fixture
def cluster(tmp_path: Path, base: Base, tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    settings = Settings.load(home=tmp_path)
    create_sqlite_database(url := f"sqlite:///{tmp_path / 'loramill.db'}")
    registry = Registry.open(url, (tmp_path / "artifacts").as_uri())
    with registry.writing() as session:
        for tenant in ("acme", "bolt"):
            tenants.create(session, tenant)
    monkeypatch.setattr(run, "find_base", lambda *_: base)
    monkeypatch.setattr(ChatTokenizer, "load", lambda *_: tokenizer)
    monkeypatch.setattr(train.time, "sleep", lambda seconds: None)
    yield Cluster(registry, settings)
    registry.close()
