"""Endpoints under load while parts of them are killed, moved, scaled and refused; the tests run in this order."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import httpx
import openai
import pytest
import torch
from openai import AsyncOpenAI

from loramill.models.catalog import Base
from loramill.names import AdapterName
from loramill.registry import adapters, tenants
from loramill.serve.model import load_decoder
from loramill.types import VersionRecord
from loramill_bench.engine.harness import write_adapters

from .conftest import Mill, running

pytestmark = pytest.mark.anyio

ENGINE, GATEWAY = "ray::ServeReplica:loramill:engine", "ray::ServeReplica:loramill:gateway"
CONTROLLER = "ray::ServeController"
TOKENS = 24


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def endpoints(tmp_path_factory: pytest.TempPathFactory, hermes_base: Base) -> Iterator[Mill]:
    """Two gateways, one to three replicas of the real base, and a second base that scales to zero."""
    settings = {
        "JOBS__SESSIONS": "1",
        "SERVE__GATEWAYS": "2",
        "SERVE__MAX_REPLICAS": "3",
        "SERVE__MAX_SEQUENCES": "16",
        "SERVE__MAX_WAITING": "4",
        "SERVE__PENDING_SECONDS": "1",
        "SERVE__DOWN_SECONDS": "3",
        "SERVE__IDLE_SECONDS": "5",
        "SERVE__BASES": f'["{hermes_base.folder}"]',
    }
    with running(tmp_path_factory.mktemp("endpoints"), **settings) as system:
        yield system


@pytest.fixture(scope="module")
def versions(endpoints: Mill, base: Base, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three random adapters of rank 16, versions of acme/bot."""
    torch.manual_seed(5)
    folders = write_adapters(
        load_decoder(base.folder, dtype=torch.bfloat16, threads=1), tmp_path_factory.mktemp("drawn"), 3
    )
    stored = [endpoints.registry.artifacts.put({file.name: file for file in each.iterdir()}) for each in folders]
    with endpoints.registry.writing() as session:
        name = AdapterName.parse("acme/bot")
        tenants.create(session, "acme")
        tenants.create(session, "globex")
        adapters.get_or_create(session, name)
        for version in stored:
            adapters.add_version(
                session,
                VersionRecord(
                    id=version, adapter=str(name), job=None, base=base.fingerprint, bytes=1, created_at=time.time()
                ),
            )
        adapters.promote(session, name, stored[0], "the first")
    return stored


@pytest.fixture(scope="module")
def keys(endpoints: Mill, versions: list[str]) -> dict[str, str]:
    with endpoints.client() as client:
        return {tenant: client.keys.create(tenant).key for tenant in ("acme", "globex")}


@dataclass
class Load:
    """The answers and errors of a number of streams, and how many streams each version has begun."""

    begun: Counter[str] = field(default_factory=Counter)
    answers: list[tuple[str, str]] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    broken: int = 0

    async def next_answer_by(self, version: str) -> None:
        """Waits until a version begins another answer."""
        before = self.begun[version]
        await eventually(lambda: self.begun[version] > before, 60, f"an answer by {version[:12]}")

    async def stream(self, client: AsyncOpenAI, model: str, tokens: int = TOKENS) -> None:
        """Reads one answer; `broken` counts those that failed after their first chunk."""
        text, begun, version = "", False, ""
        try:
            async with client.completions.with_streaming_response.create(
                model=model,
                prompt="Once upon a time",
                max_tokens=tokens,
                temperature=0,
                stream=True,
                extra_body={"ignore_eos": True},
            ) as response:
                version = response.headers.get("x-loramill-version", "")
                self.begun[version] += 1
                async for chunk in await response.parse():
                    begun, text = True, text + chunk.choices[0].text
        except openai.APIError as error:
            self.errors[f"{type(error).__name__}: {error} ({error.__cause__!r})"] += 1
            self.broken += begun
            await asyncio.sleep(0.05)
        else:
            self.answers.append((version, text))


def client(endpoints: Mill, key: str | None = None, retries: int = 0) -> AsyncOpenAI:
    return AsyncOpenAI(
        base_url=f"{endpoints.settings.gateway}/v1",
        api_key=key or endpoints.admin_key(),
        max_retries=retries,
        timeout=120,
    )


@asynccontextmanager
async def streams(api: AsyncOpenAI, model: str, count: int, tokens: int = TOKENS) -> AsyncIterator[Load]:
    """Keeps `count` streams running until the block ends, then waits for them and closes the client."""
    load, ending = Load(), asyncio.Event()

    async def stream() -> None:
        while not ending.is_set():
            await load.stream(api, model, tokens)

    async with api:
        tasks = [asyncio.create_task(stream()) for _ in range(count)]
        try:
            yield load
        finally:
            ending.set()
            await asyncio.gather(*tasks)


async def eventually(check: Callable[[], bool | Awaitable[bool]], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while True:
        result = check()
        if result if isinstance(result, bool) else await result:
            return
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        await asyncio.sleep(0.2)


def replaced(endpoints: Mill, mark: str, victim: int, count: int) -> Callable[[], bool]:
    """Whether at least `count` processes run and the victim isn't among them."""
    return lambda: len(pids := endpoints.processes(mark)) >= count and victim not in pids


async def test_promotions_fail_no_request_and_answers_keep_their_version(
    endpoints: Mill, versions: list[str], keys: dict[str, str]
) -> None:
    async with streams(client(endpoints, keys["acme"]), "acme/bot", 8) as load:
        for promoted in versions * 4:
            with endpoints.client(keys["acme"]) as own:
                own.adapters.promote("acme/bot", promoted)
            await load.next_answer_by(promoted)
    assert not load.errors
    assert set(dict(load.answers)) == set(versions)
    # Greedy: a version gives the same text, whatever was promoted meanwhile.
    alone = Load()
    async with client(endpoints, keys["acme"]) as api:
        for version in versions:
            await alone.stream(api, f"acme/bot@{version}")
    assert set(load.answers) == set(alone.answers)


async def test_every_gateway_sees_a_promotion_within_a_second(
    endpoints: Mill, versions: list[str], keys: dict[str, str]
) -> None:
    async def champion() -> str:
        async with client(endpoints, keys["acme"]) as fresh:  # a connection of its own, to whichever gateway
            return str((await fresh.models.retrieve("acme/bot")).version)  # type: ignore[attr-defined]

    for version in versions:
        assert len(endpoints.processes(GATEWAY)) == 2
        with endpoints.client(keys["acme"]) as own:
            own.adapters.promote("acme/bot", version)
        await asyncio.sleep(1.0)
        assert {await champion() for _ in range(12)} == {version}


async def test_a_killed_replica_breaks_only_answers_that_had_begun(endpoints: Mill, keys: dict[str, str]) -> None:
    victim = endpoints.processes(ENGINE)[0]
    async with streams(client(endpoints, keys["acme"]), "acme/bot", 8) as load:
        await eventually(lambda: len(load.answers) > 8, 60, "answers")
        os.kill(victim, signal.SIGKILL)
        await eventually(replaced(endpoints, ENGINE, victim, 1), 60, "another replica")
        before = len(load.answers)
        await eventually(lambda: len(load.answers) > before + 8, 90, "answers from it")
    assert sum(load.errors.values()) == load.broken <= 8, load.errors


async def test_a_killed_gateway_leaves_the_port_to_the_other(endpoints: Mill, keys: dict[str, str]) -> None:
    victim = endpoints.processes(GATEWAY)[0]
    async with streams(client(endpoints, keys["acme"], retries=2), "acme/bot", 8) as load:
        await eventually(lambda: len(load.answers) > 8, 60, "answers")
        os.kill(victim, signal.SIGKILL)
        before = len(load.answers)
        await eventually(lambda: len(load.answers) > before + 16, 60, "answers from the other")
        await eventually(replaced(endpoints, GATEWAY, victim, 2), 60, "another gateway")
    # The next test kills the controller; a gateway that has not started by then may be stopped under load later.
    await eventually(lambda: endpoints.listeners() == 2, 120, "two gateways that listen")
    assert sum(load.errors.values()) <= 8, load.errors


async def test_a_killed_controller_fails_no_request(endpoints: Mill, keys: dict[str, str]) -> None:
    (victim,) = endpoints.processes(CONTROLLER)
    async with streams(client(endpoints, keys["acme"]), "acme/bot", 8) as load:
        await eventually(lambda: len(load.answers) > 8, 60, "answers")
        os.kill(victim, signal.SIGKILL)
        await eventually(replaced(endpoints, CONTROLLER, victim, 1), 60, "another controller")
        before = len(load.answers)
        await eventually(lambda: len(load.answers) > before + 8, 60, "answers")
    assert not load.errors


async def test_a_disconnected_client_frees_its_slot(endpoints: Mill, keys: dict[str, str]) -> None:
    def metric(name: str) -> float:
        with httpx.Client(base_url=endpoints.settings.gateway, trust_env=False) as http:
            text = http.get("/metrics", headers={"authorization": f"Bearer {endpoints.admin_key()}"}).text
        return sum(
            float(line.split()[-1]) for line in text.splitlines() if line.startswith(f"loramill_engine_{name}{{")
        )

    tokens = 1500
    before = metric("generated_tokens_total")
    async with client(endpoints, keys["acme"]) as api:
        stream = await api.completions.create(
            model="acme/bot", prompt="Once", max_tokens=tokens, stream=True, extra_body={"ignore_eos": True}
        )
        await anext(aiter(stream))
        await eventually(lambda: metric("running") == 1, 60, "a running sequence")
        await stream.close()
        await eventually(lambda: metric("running") == 0, 60, "no running sequence")
    assert 0 < metric("generated_tokens_total") - before < tokens


async def test_a_revoked_key_is_refused_within_a_second_but_answers_finish(
    endpoints: Mill, versions: list[str]
) -> None:
    with endpoints.client() as admin:
        made = admin.keys.create("acme")
    async with streams(client(endpoints, made.key), "acme/bot", 4) as load:
        await eventually(lambda: len(load.answers) > 4, 60, "answers")
        with endpoints.client() as admin:
            admin.keys.revoke(made.id)
        await asyncio.sleep(1.0)
        before = len(load.answers)
        await eventually(lambda: load.errors.total() > 8, 60, "refusals")
    assert not {error for error in load.errors if not error.startswith("AuthenticationError")}
    assert load.broken == 0 and len(load.answers) <= before + 4


async def test_one_tenants_flood_adds_replicas_and_does_not_starve_another(
    endpoints: Mill, keys: dict[str, str]
) -> None:
    quiet = Load()
    await eventually(lambda: len(endpoints.processes(ENGINE)) == 1, 90, "one replica")
    async with streams(client(endpoints, keys["acme"]), "smollm2-135m", 80, 2 * TOKENS) as flood:
        await eventually(lambda: flood.errors.total() > 0, 60, "rate-limit errors")
        async with client(endpoints, keys["globex"]) as other:
            for _ in range(8):
                await quiet.stream(other, "smollm2-135m", 4)
        await eventually(lambda: len(endpoints.processes(ENGINE)) == 3, 120, "three replicas")
    assert not {error for error in flood.errors if not error.startswith("RateLimitError")}
    assert flood.answers and not quiet.errors and len(quiet.answers) == 8


async def test_replicas_that_leave_after_the_load_fail_no_request(endpoints: Mill, keys: dict[str, str]) -> None:
    async with streams(client(endpoints, keys["acme"]), "acme/bot", 1) as trickle:
        await eventually(lambda: len(endpoints.processes(ENGINE)) == 1, 120, "one replica")
    assert trickle.answers and not trickle.errors


async def test_an_idle_base_scales_to_zero_and_wakes(endpoints: Mill, hermes_base: Base) -> None:
    def replicas() -> int:
        return len(endpoints.processes(f"{ENGINE}-{hermes_base.folder.name}"))

    name = hermes_base.folder.name
    await eventually(lambda: replicas() == 0, 60, "no replica")
    async with client(endpoints) as api:
        assert name in [model.id async for model in api.models.list()]
        answer = await api.completions.create(model=name, prompt="a", max_tokens=3, extra_body={"ignore_eos": True})
    assert answer.usage is not None and answer.usage.completion_tokens == 3 and replicas() == 1
    await eventually(lambda: replicas() == 0, 60, "no replica again")
