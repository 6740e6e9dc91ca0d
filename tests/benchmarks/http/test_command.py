"""`loramill-bench serve`: its cases over a real gateway, and which of them run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loramill.errors import InvalidRequest
from loramill.models.catalog import Base
from loramill.registry import Registry, adapters, api_keys
from loramill.serve.api.app import build_api
from loramill.serve.replica.fake import EchoBackend
from loramill.settings import Settings
from loramill_bench import http as bench
from loramill_bench.http import gateway, overload, promotion, servers, testbed, throughput
from loramill_bench.http.client import Server
from loramill_bench.http.workload import DISTINCT, OUTPUT_TOKENS, PROMPT_TOKENS
from loramill_bench.results import Result

from ...serve.api.conftest import running
from .conftest import values

#: The required targets, by case.
TARGETS = {
    **{f"http none {streams}: over vLLM": ">= 1.2" for streams in (8, 32)},
    **{f"http {mix} {streams}: over vLLM": ">= 4" for mix in ("distinct", "zipf") for streams in (8, 32)},
    **{
        f"http {mix} {streams}: over the engine": ">= 0.9"
        for mix in ("none", "distinct", "zipf")
        for streams in (8, 32)
    },
    "gateway first token: added": "<= 10",
    "gateway 32: throughput lost": "<= 0.03",
    "promote 32: errors": "<= 0",
    "promote 32: p99 gap": "<= 1.2",
    "overload: p95 latency": "<= 2",
    "overload: errors": "<= 0",
}


class WorkerThread:
    """Replaces the worker process by a thread."""

    def __init__(self, environment: object = None) -> None:
        self._thread = ThreadPoolExecutor(1)

    def __enter__(self) -> WorkerThread:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()

    def submit(self, function: Callable[..., Any], *args: Any) -> Future[Any]:
        return self._thread.submit(function, *args)

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)


def test_every_case_runs_over_a_real_gateway_with_its_target(
    tiny: Base, tokenizer, few_adapters: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uncached: None
) -> None:
    """With smaller cases under the same names, and a model that repeats the prompt."""

    def smaller(case: throughput.HttpCase) -> Any:
        attributes = {field.name: getattr(case, field.name) for field in fields(case)}
        return SimpleNamespace(
            **attributes | {"streams": min(2, case.streams), "requests_per_stream": 1}, name=case.name
        )

    monkeypatch.setattr(throughput, "CASES", tuple(map(smaller, throughput.CASES)))
    for module, name, value in [
        (gateway, "_FIRST_TOKEN_REQUESTS", 2),
        (gateway, "_STREAMS", 2),
        (gateway, "_REQUESTS_PER_STREAM", 1),
        (promotion, "_STREAMS", 2),
        (promotion, "_REQUESTS_PER_STREAM", 4),
        (promotion, "_INTERVAL_SECONDS", 0.01),
        (overload, "_SECONDS", 0.2),
        (overload, "_REQUESTS_PER_STREAM", 1),
        (testbed, "WorkerProcess", WorkerThread),
    ]:
        monkeypatch.setattr(module, name, value)
    monkeypatch.setenv("LORAMILL_SERVE__MAX_SEQUENCES", "4")
    monkeypatch.setenv("LORAMILL_SERVE__KV_TOKENS", "2048")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    backend = EchoBackend(seconds_per_token=0.0005)
    up: list[Server] = []
    started: list[tuple[int, int]] = []
    published: set[str | None] = {None}

    @contextmanager
    def loramill(settings: Settings) -> Iterator[Server]:
        registry = Registry.open(settings.database, settings.artifacts)
        with registry.writing() as session:
            _, key = api_keys.create(session, None)
            published.update(
                one.id
                for each in adapters.list_adapters(session, None)
                for one in adapters.list_versions(session, each.name)
            )
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
    assert {result.case: result.target_text for result in results if result.target is not None} == TARGETS
    assert all(math.isfinite(result.value) for result in results)
    assert values(results)["promote 32: errors"] == values(results)["overload: errors"] == 0
    assert values(results)["promote 32: promotions"].expected > 0
    assert started == [(0, DISTINCT), (6, DISTINCT)]
    assert {
        (len(r.prompt.split()), r.sampling_params.max_tokens, r.sampling_params.temperature, r.ignore_eos)
        for r in backend.requests
    } == {(PROMPT_TOKENS, OUTPUT_TOKENS, 0.0, True)}
    requested = {request.version for request in backend.requests}
    assert None in requested and requested <= published
    assert len(requested) >= 1 + 2 and len(published) == 1 + 6
    assert list(tmp_path.glob("loramill-bench-*")) == []


def test_only_the_selected_cases_start_servers(tiny: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overload, "measure", lambda there, rounds: [Result("overload: errors", 0, "in all", 0)])
    assert [result.case for result in bench.run(tiny, "overload")] == ["overload: errors"]
    with pytest.raises(InvalidRequest, match=r"'nothing'.*http none 1.*http zipf 32.*promote 32, overload"):
        bench.run(tiny, "nothing")
