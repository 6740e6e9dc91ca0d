"""Canaries and shadows through real gateways: who answers, and what is counted."""

from __future__ import annotations

import asyncio
import math
import threading
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import httpx
import pytest
from openai import OpenAI

from loramill.errors import EngineFault, InvalidRequest
from loramill.pipelines.nightly.rollouts.advance import advance_periodically
from loramill.registry import adapters, usage
from loramill.registry.rollouts import moves, records, traffic
from loramill.serve.api.traffic import flush
from loramill.serve.protocol import TextChunk, TextRequest
from loramill.serve.replica.fake import EchoBackend
from loramill.types import RolloutKind, RolloutOutcome, RolloutState, WatchPolicy

from ....waiting import eventually

HEADER = "x-loramill-version"
SECONDS = 0.05


@pytest.fixture(autouse=True)
def _quick_flushes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flush, "FLUSH_INTERVAL_SECONDS", SECONDS)


@pytest.fixture
def versions(site: Any, tenant: str) -> tuple[str, str]:
    """Champion and challenger of the adapter `a`."""
    return site.publish(f"{tenant}/a", f"{tenant} one"), site.publish(f"{tenant}/a", f"{tenant} two")


class Faulty(EchoBackend):
    """Answers of one version are spoiled: longer than allowed, empty, or an error."""

    def __init__(self, version: str, how: str) -> None:
        super().__init__()
        self._version, self._how = version, how

    async def generate(self, request: TextRequest) -> AsyncGenerator[TextChunk, None]:
        if request.version != self._version:
            async for chunk in super().generate(request):
                yield chunk
            return
        self.requests.append(request)
        await asyncio.sleep(0)
        match self._how:
            case "error":
                raise EngineFault("the adapter is broken")
            case "refuse":
                raise InvalidRequest("not like this")
            case "empty":
                yield TextChunk(" ", 1, 1, "stop")
            case _:
                yield TextChunk("and on and on", 1, 4, "length")


def ask(client: OpenAI, model: str, user: str | None = None, **more: Any) -> str:
    """The version that answers."""
    options = {} if user is None else {"user": user}
    raw = client.chat.completions.with_raw_response.create(
        model=model, messages=[{"role": "user", "content": "hello there"}], **options, **more
    )
    raw.parse()
    return str(raw.headers[HEADER])


def state(site: Any, adapter: str) -> RolloutState:
    with site.registry.reading() as session:
        return traffic.measured(session, records.list_rollouts(session, name=adapter)[0])


def test_each_user_gets_one_version_and_the_share_is_kept(
    client: OpenAI, site: Any, tenant: str, versions: tuple[str, str], http: httpx.Client
) -> None:
    champion, challenger = versions
    http.post(f"/v1/adapters/{tenant}/a/canary", json={"share": 0.3}).raise_for_status()
    with ThreadPoolExecutor(8) as pool:
        sides = [list(pool.map(lambda n: ask(client, f"{tenant}/a", f"user {n}"), range(120))) for _ in range(2)]
    assert sides[0] == sides[1]
    found = Counter(sides[0])
    assert found.keys() == {champion, challenger}
    assert abs(found[challenger] - 36) <= 5 * math.sqrt(120 * 0.3 * 0.7)
    http.post(f"/v1/adapters/{tenant}/a/canary", json={"share": 0.6}).raise_for_status()
    grown = [ask(client, f"{tenant}/a", f"user {n}") for n in range(40)]
    assert all(after == challenger for before, after in zip(sides[0], grown, strict=False) if before == challenger)
    eventually(lambda: state(site, f"{tenant}/a").tried.requests + state(site, f"{tenant}/a").compared.requests == 280)


def test_without_a_user_the_api_key_decides(
    site: Any, tenant: str, versions: tuple[str, str], http: httpx.Client
) -> None:
    http.post(f"/v1/adapters/{tenant}/a/canary", json={"share": 0.5}).raise_for_status()
    sides = []
    for _ in range(24):
        with site.openai(site.key(tenant)) as client:
            sides.append({ask(client, f"{tenant}/a") for _ in range(2)})
    assert all(len(side) == 1 for side in sides)
    assert set.union(*sides) == set(versions)  # wrong once in 8 million times


def test_names_with_a_version_are_not_redirected(
    client: OpenAI, site: Any, tenant: str, versions: tuple[str, str], http: httpx.Client
) -> None:
    champion, challenger = versions
    http.post(f"/v1/adapters/{tenant}/a/canary", json={"share": 1.0}).raise_for_status()
    assert ask(client, f"{tenant}/a") == challenger
    assert ask(client, f"{tenant}/a@champion") == champion
    assert ask(client, f"{tenant}/a@challenger") == challenger
    assert ask(client, f"{tenant}/a@{champion[:12]}") == champion
    assert http.get(f"/v1/models/{tenant}/a").json()["version"] == champion
    eventually(lambda: state(site, f"{tenant}/a").tried.requests == 1)
    assert state(site, f"{tenant}/a").compared.requests == 0


def test_streams_and_completions_name_their_version_too(
    client: OpenAI, tenant: str, versions: tuple[str, str], http: httpx.Client
) -> None:
    http.post(f"/v1/adapters/{tenant}/a/canary", json={"share": 1.0}).raise_for_status()
    for path, body in (
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "stream": True}),
        ("/v1/completions", {"prompt": "hi"}),
        ("/v1/completions", {"prompt": "hi", "stream": True}),
    ):
        assert http.post(path, json={"model": f"{tenant}/a", **body}).headers[HEADER] == versions[1]


def test_starting_and_ending_take_effect_at_once_and_at_other_gateways(
    site: Any, twin: Any, tenant: str, versions: tuple[str, str], http: httpx.Client
) -> None:
    champion, challenger = versions
    with site.openai(site.key(tenant)) as first, twin.openai(site.key(tenant)) as second:
        assert ask(first, f"{tenant}/a") == ask(second, f"{tenant}/a") == champion
        http.post(f"/v1/adapters/{tenant}/a/canary", json={"share": 1.0}).raise_for_status()
        assert ask(first, f"{tenant}/a") == challenger
        eventually(lambda: ask(second, f"{tenant}/a") == challenger)
        http.delete(f"/v1/adapters/{tenant}/a/canary").raise_for_status()
        assert ask(first, f"{tenant}/a") == champion
        eventually(lambda: ask(second, f"{tenant}/a") == champion)
        http.post(f"/v1/adapters/{tenant}/a/canary", json={"share": 1.0}).raise_for_status()
        http.post(f"/v1/adapters/{tenant}/a/promote", json={"version": champion}).raise_for_status()
        assert ask(first, f"{tenant}/a") == challenger
        http.post(f"/v1/adapters/{tenant}/a/pin").raise_for_status()
        assert ask(first, f"{tenant}/a") == champion


def test_both_gateways_add_to_what_is_measured(
    site: Any, twin: Any, tenant: str, versions: tuple[str, str], http: httpx.Client
) -> None:
    http.post(f"/v1/adapters/{tenant}/a/canary", json={"share": 1.0}).raise_for_status()
    for gateway in (site, twin):
        with gateway.openai(site.key(tenant)) as client:
            eventually(lambda client=client: ask(client, f"{tenant}/a") == versions[1])
            for _ in range(3):
                ask(client, f"{tenant}/a", n=2, max_tokens=1)
    eventually(lambda: state(site, f"{tenant}/a").tried.cut == 6)
    tried = state(site, f"{tenant}/a").tried
    assert sum(tried.total_histogram.values()) == tried.requests


@pytest.mark.parametrize("how", ["error", "refuse", "empty", "long"])
def test_signals_of_faulty_versions_are_counted(
    client: OpenAI, site: Any, tenant: str, versions: tuple[str, str], http: httpx.Client, how: str
) -> None:
    site.backend.now = Faulty(versions[1], how)
    http.post(f"/v1/adapters/{tenant}/a/canary", json={"share": 1.0}).raise_for_status()
    for stream in (False, True):
        http.post(
            "/v1/chat/completions",
            json={"model": f"{tenant}/a", "messages": [{"role": "user", "content": "hi"}], "stream": stream},
        )
    http.post(f"/v1/adapters/{tenant}/a/canary", json={"share": 0.0}).raise_for_status()
    ask(client, f"{tenant}/a")
    eventually(lambda: state(site, f"{tenant}/a").compared.requests == 1)
    tried = state(site, f"{tenant}/a").tried
    expected = {"error": (2, 2, 0, 0), "refuse": (0, 0, 0, 0), "empty": (2, 0, 2, 0), "long": (2, 0, 0, 2)}
    assert (tried.requests, tried.errors, tried.empty, tried.cut) == expected[how]


def test_a_shadow_changes_neither_answers_nor_usage(
    client: OpenAI,
    site: Any,
    tenant: str,
    versions: tuple[str, str],
    http: httpx.Client,
    flushed: Callable[[Any], None],
) -> None:
    champion, challenger = versions
    site.backend.now = backend = Faulty(challenger, "error")
    http.post(f"/v1/adapters/{tenant}/a/canary", json={"share": 1.0, "shadow": True}).raise_for_status()
    assert {ask(client, f"{tenant}/a") for _ in range(5)} == {champion}
    eventually(lambda: state(site, f"{tenant}/a").tried.errors == 5)
    copies = [request for request in backend.requests if request.version == challenger]
    assert {(request.priority, request.tenant) for request in copies} == {(-1, "(shadow)")}
    flushed(site)
    with site.registry.reading() as session:
        rows = usage.daily(session, tenant, "2000-01-01", "2100-01-01")
    assert [(row.version, row.requests) for row in rows] == [(champion, 5)]


def test_a_shadow_copies_its_share_of_the_requests(
    client: OpenAI, site: Any, tenant: str, versions: tuple[str, str], http: httpx.Client, echo: EchoBackend
) -> None:
    http.post(f"/v1/adapters/{tenant}/a/canary", json={"share": 0.3, "shadow": True}).raise_for_status()
    for _ in range(100):
        ask(client, f"{tenant}/a", "the same user")
    eventually(lambda: not echo.active)
    copies = sum(request.version == versions[1] for request in echo.requests)
    assert abs(copies - 30) <= 5 * math.sqrt(100 * 0.3 * 0.7)


@contextmanager
def load(client: OpenAI, model: str) -> Iterator[tuple[list[str], list[Exception]]]:
    """Eight users who ask again and again: the versions that answered, and what failed."""
    stop, answered, failed = threading.Event(), [], []

    def user(number: int) -> None:
        while not stop.is_set():
            try:
                answered.append(ask(client, model, f"user {number}", stream=False))
            except Exception as error:  # noqa: BLE001 - the test shows it
                failed.append(error)

    with ThreadPoolExecutor(8) as pool:
        for number in range(8):
            pool.submit(user, number)
        try:
            yield answered, failed
        finally:
            stop.set()


@pytest.fixture
def _deciding(site: Any) -> Iterator[None]:
    stop = threading.Event()
    thread = threading.Thread(
        target=advance_periodically, args=(site.registry, stop), kwargs={"interval_seconds": SECONDS}
    )
    thread.start()
    yield
    stop.set()
    thread.join()


@pytest.mark.usefixtures("_deciding")
@pytest.mark.parametrize("canary", [False, True])
def test_a_bad_version_is_rolled_back_under_load_without_a_failure(
    client: OpenAI, site: Any, tenant: str, versions: tuple[str, str], canary: bool
) -> None:
    champion, challenger = versions
    site.backend.now, name = Faulty(challenger, "long"), f"{tenant}/a"
    policy = WatchPolicy(min_requests=50)
    with load(client, name) as (answered, failed):
        eventually(lambda: len(answered) >= 60)  # what the watch compares with
        with site.registry.writing() as session:
            if canary:
                moves.start_canary(session, name, share=0.5, policy=policy, promote_at_end=True)
            else:
                moves.promote_watched(session, name, challenger, "better", policy=policy)
        eventually(lambda: state(site, name).outcome is not None)
        rolled_back = len(answered)
        eventually(lambda: len(answered) >= rolled_back + 30)
    assert failed == []
    assert set(answered[rolled_back + 10 :]) == {champion}
    ended = state(site, name)
    assert (ended.kind is RolloutKind.WATCH, ended.outcome) == (not canary, RolloutOutcome.ROLLED_BACK)
    assert "cut at their length limit" in ended.reason
    with site.registry.reading() as session:
        assert adapters.get(session, name).champion == champion


@pytest.mark.usefixtures("_deciding")
def test_a_good_version_passes_its_canary_and_its_watch(
    client: OpenAI, site: Any, tenant: str, versions: tuple[str, str], http: httpx.Client
) -> None:
    name = f"{tenant}/a"
    with load(client, name) as (answered, failed):
        body = {"share": 0.5, "promote_after_seconds": 1.0, "min_requests": 10}
        http.post(f"/v1/adapters/{name}/canary", json=body).raise_for_status()
        eventually(lambda: state(site, name).outcome is RolloutOutcome.KEPT)
        eventually(lambda: answered[-1] == versions[1])
    assert failed == []
    shown = http.get(f"/v1/adapters/{name}").json()["rollouts"]
    assert [(each["kind"], each["outcome"]) for each in shown] == [("watch", "kept"), ("canary", "promoted")]


def test_a_canary_of_a_base_that_is_not_served_answers_nothing(
    client: OpenAI, site: Any, tenant: str, versions: tuple[str, str], http: httpx.Client
) -> None:
    elsewhere = replace(site, base=replace(site.base, fingerprint="f" * 64))
    elsewhere.publish(f"{tenant}/a", f"{tenant} three")
    http.post(f"/v1/adapters/{tenant}/a/canary", json={"share": 1.0}).raise_for_status()
    assert ask(client, f"{tenant}/a") == versions[0]
