"""A tiny base with random adapters in a registry, and fewer of them than the benchmark measures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import Any

import pytest

from loramill.models.catalog import Base
from loramill.settings import Settings
from loramill_bench.http import direct, promotion, publish, rounds
from loramill_bench.results import Result

from ...llama import tiny_llama, write_base


@pytest.fixture(scope="session")
def tiny(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Base:
    """A tiny random Llama that reads and writes the real base's tokens."""
    model = tiny_llama(vocab_size=49152, max_position_embeddings=1024, tie_word_embeddings=True)
    folder = write_base(tmp_path_factory.mktemp("tiny"), model, base.folder)
    return Base("tiny", folder, "0" * 64, "LlamaForCausalLM", 1024)


@pytest.fixture(scope="session")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return Settings(home=tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="session")
def published(tiny: Base, settings: Settings) -> publish.PublishedAdapters:
    with publish_fewer():
        return publish.publish(settings, tiny, seed=3)


@pytest.fixture
def few_adapters() -> Iterator[None]:
    """Fewer adapters than the benchmark publishes."""
    with publish_fewer():
        yield


@contextmanager
def publish_fewer() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(publish, "ADAPTERS", 6)
        patch.setattr(publish, "DISTINCT", 2)
        patch.setattr(promotion, "DISTINCT", 2)
        yield


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "_PAUSE_SECONDS", 0.0)


@pytest.fixture
def uncached(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Closes the engines that the bare engine's process would cache."""
    with ExitStack() as opened:

        def closed_after_test(kind: Callable[..., Any]) -> Callable[..., Any]:
            return lambda *args: opened.enter_context(closing(kind(*args)))

        for name in ("Engine", "OfflineEngine"):
            monkeypatch.setattr(direct, name, closed_after_test(getattr(direct, name)))
        yield
    direct._engine.cache_clear()
    direct._offline.cache_clear()


def values(results: list[Result]) -> dict[str, float]:
    return {result.case: pytest.approx(result.value) for result in results}
