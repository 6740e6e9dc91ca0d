"""A redeployment under Ray Serve: open streams finish, and no request is refused meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import OpenAI
from ray import serve

from loramill.models.catalog import Base
from loramill.registry import Registry, api_keys, migrate
from loramill.serve.deployments import deploy
from loramill.settings import Settings

from ..e2e.conftest import free_port
from ..ray_cluster import ray_cluster

TOKENS = 3000


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory, hermes_base: Base) -> Iterator[Settings]:
    home = tmp_path_factory.mktemp("redeployed")
    # Answers can take longer on a busy machine than the default of 120 s.
    serving = {"port": free_port(), "max_sequences": 8, "drain_seconds": 600}
    settings = Settings.load(home=home, cache=home / "cache", base=str(hermes_base.folder), serve=serving)
    with ray_cluster(num_cpus=4):
        migrate(settings.database)
        deploy(settings)
        yield settings
        serve.shutdown()


@pytest.fixture(scope="module")
def client(settings: Settings) -> OpenAI:
    registry = Registry.open(settings.database, settings.artifacts)
    with registry.writing() as session:
        _, secret = api_keys.create(session, None)
    return OpenAI(base_url=f"{settings.address}/v1", api_key=secret, max_retries=2, timeout=600)


def complete(client: OpenAI, settings: Settings, tokens: int, begun: threading.Event | None = None) -> int:
    """Streams an answer, and sets `begun` at its first chunk; returns its number of tokens."""
    stream = client.completions.create(
        model=Path(settings.base).name,
        prompt="once",
        max_tokens=tokens,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    if begun is not None:
        begun.set()
    *_, last = stream
    assert last.usage is not None
    return last.usage.completion_tokens


def test_a_redeployment_cuts_no_stream(settings: Settings, client: OpenAI) -> None:
    assert complete(client, settings, 2) == 2
    got: list[int] = []
    begun = [threading.Event() for _ in range(6)]
    streams = [
        threading.Thread(target=lambda e=each: got.append(complete(client, settings, TOKENS, e))) for each in begun
    ]
    for stream in streams:
        stream.start()
    assert all(each.wait(300) for each in begun)
    assert all(stream.is_alive() for stream in streams), "the answers ended before the redeployment"
    deploy(settings.model_copy(update={"serve": settings.serve.model_copy(update={"max_sequences": 9})}))
    assert complete(client, settings, 2) == 2
    for stream in streams:
        stream.join()
    assert got == [TOKENS] * 6
