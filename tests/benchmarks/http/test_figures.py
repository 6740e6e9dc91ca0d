"""The results that are computed from given runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from loramill.errors import EngineFault
from loramill.settings import ServeSettings
from loramill_bench.http import answers, gateway, overload, promotion, rounds, throughput
from loramill_bench.http.answers import Answer, Run
from loramill_bench.http.client import Server
from loramill_bench.http.workload import OUTPUT_TOKENS

from .conftest import values


def run_of(
    rate: float = 64.0,
    *,
    first: float = 0.5,
    gap: float = 0.25,
    latency: float = 2.0,
    cpu: float = 0.0,
    others: Sequence[Answer] = (),
) -> Run:
    """A run of two answers with these figures, and of the other answers."""
    answer = Answer.completed(OUTPUT_TOKENS, (first, first + gap, first + 2 * gap), latency)
    seconds = 2 * OUTPUT_TOKENS / rate
    return Run(seconds, cpu * seconds, (answer, answer, *others))


def test_figures_are_of_complete_answers() -> None:
    wrong = [Answer(seconds=9.0, refused=True), Answer(3, (7.0, 8.5), 9.0, fault="3 tokens instead of 64")]
    run = run_of(64.0, first=0.5, gap=0.25, latency=2.0, others=wrong)
    assert answers.output_rate(run) == 64.0
    assert answers.median_first_token(run) == 0.5
    assert answers.p99_gap(run) == pytest.approx(0.25)
    assert answers.p95_latency(run) == 2.0
    with pytest.raises(EngineFault, match="No answer was completed"):
        answers.p95_latency(Run(1.0, 0.0, tuple(wrong)))


def test_the_first_gap_is_not_the_time_to_the_first_token() -> None:
    answer = Answer.completed(OUTPUT_TOKENS, (5.0, 5.25, 5.5, 7.5), 8.0)
    run = Run(8.0, 0.0, (answer,))
    assert answers.median_first_token(run) == 5.0
    assert 1.9 < answers.p99_gap(run) <= 2.0


def test_variants_take_turns_and_the_first_round_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "_PAUSE_SECONDS", 0.0)
    calls: list[tuple[str, object]] = []

    def variant(name: str) -> Callable[[Any], Run]:
        return lambda work: calls.append((name, work)) or run_of(10.0 * work[0])

    draw: Any = lambda number: (number + 1,)  # noqa: E731
    runs = rounds.run_in_turns({"a": variant("a"), "b": variant("b")}, draw, 3)
    order = [("b", 0), ("a", 0), ("a", 1), ("b", 1), ("b", 2), ("a", 2), ("a", 3), ("b", 3)]
    assert calls == [(name, (number + 1,)) for name, number in order]
    assert [answers.output_rate(run) for run in runs["a"]] == [20.0, 30.0, 40.0]
    assert rounds.median_of(runs["a"], answers.output_rate) == 30.0


class FakeTestbed:
    """A testbed whose parts return given runs; `calls` has each part with its workload."""

    def __init__(self, vllm: Path | None = Path("python"), **runs: Run) -> None:
        self.vllm, self.cores, self.runs = vllm, 2, runs
        self.serve = ServeSettings(max_sequences=16)
        self.loramill, self.vllm_base, self.vllm_adapters = "loramill", "vllm_base", "vllm_adapters"
        self.calls: list[tuple[str, Any]] = []
        self.workload = SimpleNamespace(closed_loop=lambda *workload: workload, poisson=lambda *workload: workload)

    def run_streams(self, server: str, workload: Any) -> Run:
        self.calls.append((server, workload))
        return self.runs[f"{server} {workload[3]}" if f"{server} {workload[3]}" in self.runs else server]

    def run_direct(self, run: Callable[..., Run], workload: Any) -> Run:
        return self.run_streams(run.__name__, workload)


@pytest.mark.parametrize(("mix", "vllm"), [("none", "vllm_base"), ("zipf", "vllm_adapters")])
def test_speed_is_compared_with_vllm_and_with_the_engine(mix: Any, vllm: str) -> None:
    testbed = FakeTestbed(loramill=run_of(90.0, first=0.5), run_engine=run_of(120.0), **{vllm: run_of(30.0, first=1.5)})
    results = throughput.measure(testbed, throughput.HttpCase(mix, 8, 4.0), rounds=2)  # type: ignore[arg-type]
    assert values(results) == {
        f"http {mix} 8: over vLLM": 3.0,
        f"http {mix} 8: output throughput": 90.0,
        f"http {mix} 8: first token": 500.0,
        f"http {mix} 8: over the engine": 0.75,
        f"http {mix} 8: vLLM's output throughput": 30.0,
        f"http {mix} 8: vLLM's first token": 1500.0,
    }
    assert [result.met for result in results] == [False, None, None, False, None, None]
    assert [work for part, work in testbed.calls if part == vllm] == [(mix, 8, 1, 0), (mix, 8, 4, 1), (mix, 8, 4, 2)]


def test_without_vllm_its_cases_are_left_out() -> None:
    testbed = FakeTestbed(None, loramill=run_of(90.0), run_engine=run_of(100.0))
    results = throughput.measure(testbed, throughput.HttpCase("none", 1), rounds=1)  # type: ignore[arg-type]
    assert [result.case for result in results] == [
        "http none 1: output throughput",
        "http none 1: first token",
        "http none 1: over the engine",
    ]
    assert {result.target for result in results} == {None}


@pytest.mark.parametrize("part", ["loramill", "run_engine", "vllm_base"])
def test_runs_with_faults_are_not_compared(part: str) -> None:
    runs = {name: run_of() for name in ("loramill", "run_engine", "vllm_base")}
    runs[part] = run_of(others=[Answer(fault="HTTP 500: broken")])
    with pytest.raises(EngineFault, match="1 of 3 requests without a proper answer: HTTP 500: broken"):
        throughput.measure(FakeTestbed(**runs), throughput.HttpCase("none", 1), rounds=1)  # type: ignore[arg-type]


def test_the_gateways_time_is_the_time_without_the_engine() -> None:
    testbed = FakeTestbed(loramill=run_of(first=0.033), run_engine=run_of(first=0.025))
    results = gateway.measure_first_token(testbed, rounds=1)  # type: ignore[arg-type]
    assert values(results) == {
        "gateway first token: added": 8.0,
        "gateway first token: over HTTP": 33.0,
        "gateway first token: engine called directly": 25.0,
    }
    assert results[0].met


def test_throughput_is_corrected_for_the_clients_cpu_time() -> None:
    """The client takes 0.2 of two cores, a tenth: the server did 81 with the rest, so it would do 90 with all."""
    testbed = FakeTestbed(loramill=run_of(81.0, cpu=0.2), run_replica=run_of(100.0))
    results = gateway.measure_throughput(testbed, rounds=1)  # type: ignore[arg-type]
    assert values(results) == {
        "gateway 32: throughput lost": 0.1,
        "gateway 32: output throughput": 81.0,
        "gateway 32: the replica's output throughput": 100.0,
        "gateway 32: client CPU time": 0.2,
    }
    assert results[0].met is False


def test_the_offered_load_is_a_multiple_of_the_capacity() -> None:
    refused, wrong = Answer(seconds=0.1, refused=True), Answer(seconds=60.0, fault="HTTP 503: no")
    testbed = FakeTestbed(
        loramill=run_of(),
        **{"loramill capacity": run_of(64.0, latency=2.0), "loramill overload": run_of(32.0, latency=3.0)},
    )
    testbed.runs["loramill overload"] = run_of(32.0, latency=3.0, others=[refused, refused, refused, wrong])
    results = overload.measure(testbed, rounds=1)  # type: ignore[arg-type]
    assert values(results) == {
        "overload: p95 latency": 1.5,
        "overload: errors": 1.0,
        "overload: accepted": 1 / 3,
        "overload: output throughput": 32.0,
        "overload: output throughput at capacity": 64.0,
        "overload: p95 latency at capacity": 2.0,
    }
    assert [result.met for result in results[:2]] == [True, False]
    _, capacity, offered = [work for _, work in testbed.calls]
    assert capacity == ("zipf", 16, 4, "capacity")
    assert offered == ("zipf", 3.0, 20.0, "overload")  # the capacity is one request per second


def test_promotions_continue_until_the_run_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each adapter's second version, then each one's first; errors are reported, not raised."""
    monkeypatch.setattr(promotion, "_INTERVAL_SECONDS", 0.0)
    sent: list[tuple[str, bytes]] = []
    run: Future[Run] = Future()

    def receive(request: httpx.Request) -> httpx.Response:
        sent.append((request.url.path, request.content))
        if len(sent) % 3 == 0:
            run.set_result(run_of(gap=0.3, others=[Answer(fault="HTTP 500: broken")]))
        return httpx.Response(200)

    http_client = httpx.Client
    monkeypatch.setattr(
        promotion.httpx, "Client", lambda **options: http_client(**options, transport=httpx.MockTransport(receive))
    )

    def start_streams(server: Server, streams: object) -> Future[Run]:
        nonlocal run
        run = Future()
        return run

    testbed = FakeTestbed(loramill=run_of(gap=0.2))
    testbed.loramill = Server(1)  # type: ignore[assignment]
    testbed.run_streams = lambda server, streams: run_of(gap=0.2)  # type: ignore[method-assign]
    testbed.start_streams = start_streams  # type: ignore[attr-defined]
    testbed.published = SimpleNamespace(versions={"a/x": ("1", "2"), "b/x": ("3", "4")})  # type: ignore[attr-defined]
    results = promotion.measure(testbed, rounds=1)  # type: ignore[arg-type]
    assert values(results) == {
        "promote 32: errors": 1.0,
        "promote 32: p99 gap": 1.5,
        "promote 32: p99 gap without promotions": 200.0,
        "promote 32: promotions": 6.0,
    }
    assert [result.met for result in results[:2]] == [False, False]
    paths = [f"/v1/adapters/{name}/promote" for name in ("a/x", "b/x")]
    assert sent == [
        (path, b'{"version":"%d"}' % version) for path, version in zip(paths * 3, (2, 4, 1, 3, 2, 4), strict=True)
    ]
