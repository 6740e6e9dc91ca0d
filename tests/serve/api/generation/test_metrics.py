"""GET /metrics, and the gateway's counts of real requests."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

from loramill.errors import Overloaded, QuotaExceeded, Unavailable
from loramill.serve.api.dependencies import ServedBase
from loramill.serve.api.generation import metrics as generation_metrics
from loramill.serve.api.generation.admission import admitted
from loramill.serve.api.generation.model_lookup import Target
from loramill.serve.api.limits.tracker import UsageTracker
from loramill.serve.metrics.definitions import ADMIN_LABEL, OTHER_LABEL, BoundedLabels
from loramill.serve.protocol import TextChunk, TextRequest
from loramill.serve.replica.fake import EchoBackend

from ....waiting import eventually

HELLO: Any = [{"role": "user", "content": "one two three"}]


class Seen:
    """The samples that /metrics returns."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]

    def __call__(self, name: str, **labels: str) -> float:
        """The sum of all samples of this name that have these labels."""
        return sum(
            sample.value
            for sample in self._samples
            if sample.name == f"loramill_{name}" and labels.items() <= sample.labels.items()
        )

    def codes(self, tenant: str) -> dict[str, float]:
        """Generations of a tenant by status."""
        mine = (s for s in self._samples if s.name == "loramill_requests_total" and s.labels["tenant"] == tenant)
        return {sample.labels["code"]: sample.value for sample in mine}


@pytest.fixture
def scrape(site: Any) -> Iterator[Callable[[], Seen]]:
    with site.http(site.admin_key) as http:
        yield lambda: Seen(http.get("/metrics").raise_for_status().text)


@pytest.fixture(autouse=True)
def fresh_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests' tenants have taken labels already."""
    monkeypatch.setattr(generation_metrics, "_tenant_label", BoundedLabels(10))
    monkeypatch.setattr(generation_metrics, "_adapter_label", BoundedLabels(10))


class Answering(EchoBackend):
    """Yields these chunks, then raises the error."""

    def __init__(self, chunks: list[TextChunk], error: Exception | None = None) -> None:
        super().__init__()
        self._chunks, self._error = chunks, error

    async def generate(self, request: TextRequest) -> AsyncGenerator[TextChunk, None]:
        for chunk in self._chunks:
            yield chunk
        if self._error:
            raise self._error


# -- access ------------------------------------------------------------------------------------------------------------


def test_only_an_admin_may_read_them(site: Any, http: httpx.Client) -> None:
    assert http.get("/metrics").status_code == 403
    with site.http() as anonymous:
        assert anonymous.get("/metrics").status_code == 401
    with site.http(site.admin_key) as admin:
        answer = admin.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    assert list(text_string_to_metric_families(answer.text))


# -- generations -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_generation_is_counted(client: OpenAI, site: Any, tenant: str, scrape: Any, stream: bool) -> None:
    version = site.publish(f"{tenant}/support", f"{tenant} {stream}")
    client.completions.create(model="tiny", prompt="a b", max_tokens=1)
    answer = client.chat.completions.create(model=f"{tenant}/support@{version[:12]}", messages=HELLO, stream=stream)
    if stream:
        list(answer)
    seen, adapter = scrape(), f"{tenant}/support"
    assert seen("requests_total", endpoint="chat", tenant=tenant, adapter=adapter, code="200") == 1
    assert seen("requests_total", endpoint="completions", tenant=tenant, adapter="tiny", code="200") == 1
    for name, adapter_tokens, base_tokens in (("prompt_tokens_total", 3, 2), ("completion_tokens_total", 3, 1)):
        assert seen(name, tenant=tenant, adapter=adapter) == adapter_tokens
        assert seen(name, tenant=tenant, adapter="tiny") == base_tokens
    assert seen("time_to_first_token_seconds_count", tenant=tenant, adapter=adapter) == 1
    assert seen("time_between_tokens_seconds_count", tenant=tenant) == 2
    assert seen("request_duration_seconds_count", tenant=tenant) == 2
    assert seen("requests_in_flight") == 0
    assert version[:8] not in seen.text, "versions are too many to be labels"


def test_several_answers(client: OpenAI, tenant: str, scrape: Any) -> None:
    usage = client.completions.create(model="tiny", prompt=["a b c", "d e", "d e f"], n=2, max_tokens=2).usage
    seen = scrape()
    assert usage is not None
    assert seen("prompt_tokens_total", tenant=tenant) == usage.prompt_tokens == 8
    assert seen("completion_tokens_total", tenant=tenant) == usage.completion_tokens == 12
    assert seen("time_to_first_token_seconds_count", tenant=tenant) == 6
    assert seen("time_between_tokens_seconds_count", tenant=tenant) == 6
    assert seen.codes(tenant) == {"200": 1}


def test_time_is_measured(client: OpenAI, site: Any, tenant: str, scrape: Any) -> None:
    site.backend.now = EchoBackend(seconds_per_token=0.05)
    client.chat.completions.create(model="tiny", messages=HELLO)
    seen = scrape()
    # A chunk that is seen late makes the next gap shorter, and a timer may fire a millisecond early.
    first, between = (
        seen(f"time_{which}_seconds_sum", tenant=tenant) for which in ("to_first_token", "between_tokens")
    )
    assert first > 0.04 and between > 0.05 and first + between > 0.14
    assert seen("request_duration_seconds_sum", tenant=tenant) > 0.14


def test_a_chunk_of_several_tokens_shares_its_gap(client: OpenAI, site: Any, tenant: str, scrape: Any) -> None:
    class Jerky(Answering):
        async def generate(self, request: TextRequest) -> AsyncGenerator[TextChunk, None]:
            yield TextChunk("a", 2, 1)
            time.sleep(0.4)
            yield TextChunk("b c d e", 2, 5)
            yield TextChunk("", 2, 5, "stop")  # no token, no gap

    site.backend.now = Jerky([])
    client.chat.completions.create(model="tiny", messages=HELLO)
    seen = scrape()
    assert seen("time_between_tokens_seconds_count", tenant=tenant) == 1
    assert 0.1 <= seen("time_between_tokens_seconds_sum", tenant=tenant) < 0.4
    assert seen("completion_tokens_total", tenant=tenant) == 5


def test_an_answer_without_tokens(client: OpenAI, site: Any, tenant: str, scrape: Any) -> None:
    site.backend.now = Answering([TextChunk("", 4, 0), TextChunk("", 4, 0, "stop")])
    client.chat.completions.create(model="tiny", messages=HELLO)
    seen = scrape()
    assert seen("prompt_tokens_total", tenant=tenant) == 4
    assert seen("completion_tokens_total", tenant=tenant) == 0
    assert seen("time_to_first_token_seconds_count", tenant=tenant) == 1


def test_an_admin_has_a_label_of_its_own(admin: OpenAI, site: Any, tenant: str, scrape: Any) -> None:
    before = scrape()
    site.publish(f"{tenant}/support", f"{tenant} admin")
    for model in ("tiny", f"{tenant}/support"):
        admin.chat.completions.create(model=model, messages=HELLO)
    seen = scrape()
    base = {"tenant": ADMIN_LABEL, "adapter": "tiny"}
    assert seen("requests_total", **base) == before("requests_total", **base) + 1
    assert seen("requests_total", tenant=tenant, adapter=f"{tenant}/support") == 1


def test_further_tenants_and_adapters_share_a_label(
    site: Any, tenant: str, other: str, scrape: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation_metrics, "_tenant_label", BoundedLabels(1))
    monkeypatch.setattr(generation_metrics, "_adapter_label", BoundedLabels(1))
    before = scrape()
    for name in (tenant, other, tenant):
        site.publish(f"{name}/support", name)
        site.openai(site.key(name)).chat.completions.create(model=f"{name}/support", messages=HELLO)
    seen = scrape()
    assert seen("requests_total", tenant=tenant, adapter=f"{tenant}/support") == 2
    assert (
        seen("requests_total", tenant=OTHER_LABEL, adapter=OTHER_LABEL)
        == before("requests_total", tenant=OTHER_LABEL) + 1
    )
    assert other not in seen.text


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "code", "reason"),
    [
        (Overloaded("full"), "429", "overloaded"),
        (Unavailable("none"), "503", "unavailable"),
        (RuntimeError("bug"), "500", None),
    ],
)
def test_refused_by_the_backend(
    client: OpenAI, site: Any, tenant: str, scrape: Any, error: Exception, code: str, reason: str | None, stream: bool
) -> None:
    site.backend.now = Answering([], error)
    with pytest.raises(openai.APIStatusError):
        client.chat.completions.create(model="tiny", messages=HELLO, stream=stream)
    seen = scrape()
    assert seen.codes(tenant) == {code: 1}
    assert seen("refused_requests_total", tenant=tenant) == (reason is not None)
    assert reason is None or seen("refused_requests_total", tenant=tenant, reason=reason) == 1
    assert seen("request_duration_seconds_count", tenant=tenant) == 0
    assert seen("requests_in_flight") == 0


def test_refused_at_admission(
    client: OpenAI, tenant: str, scrape: Any, monkeypatch: pytest.MonkeyPatch, echo: EchoBackend
) -> None:
    def refuse(*_: object) -> Any:
        raise QuotaExceeded("too many per minute")

    monkeypatch.setattr(UsageTracker, "acquire", refuse)
    with pytest.raises(openai.RateLimitError):
        client.chat.completions.create(model="tiny", messages=HELLO)
    seen = scrape()
    assert seen.codes(tenant) == {"429": 1}
    assert seen("refused_requests_total", tenant=tenant, reason="quota_exceeded") == 1
    assert not echo.requests


def test_a_loss_in_mid_stream_is_an_error_but_not_a_refusal(
    client: OpenAI, site: Any, tenant: str, scrape: Any
) -> None:
    site.backend.now = Answering([TextChunk("a", 2, 1), TextChunk(" b", 2, 2)], Unavailable("lost"))
    with pytest.raises(openai.APIError):
        list(client.chat.completions.create(model="tiny", messages=HELLO, stream=True))
    seen = scrape()
    assert seen.codes(tenant) == {"503": 1}
    assert seen("refused_requests_total", tenant=tenant) == 0
    assert seen("completion_tokens_total", tenant=tenant) == 2


@pytest.mark.parametrize("stream", [False, True])
def test_a_disconnected_caller_is_counted(
    client: OpenAI, site: Any, tenant: str, scrape: Any, echo: EchoBackend, stream: bool
) -> None:
    site.backend.now = slow = EchoBackend(seconds_per_token=0.02)
    long: Any = [{"role": "user", "content": "word " * 2000}]
    if stream:
        with client.chat.completions.create(model="tiny", messages=long, stream=True) as chunks:
            next(iter(chunks))
            assert scrape()("requests_in_flight") == 1
    else:
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=1.0).chat.completions.create(model="tiny", messages=long)
    eventually(lambda: not slow.active and scrape().codes(tenant) == {"499": 1})
    seen = scrape()
    assert seen.codes(tenant) == {"499": 1}
    assert seen("requests_in_flight") == 0
    assert 0 < seen("completion_tokens_total", tenant=tenant) < 2000
    assert seen("request_duration_seconds_count", tenant=tenant) == 0


@pytest.mark.parametrize(("read", "code"), [(0, "499"), (1, "499"), (2, "200")])
def test_an_answer_that_is_not_read_to_its_end_is_closed(site: Any, scrape: Any, read: int, code: str) -> None:
    open_: list[int] = []
    tenant = f"unread-{read}"

    class Longwinded:
        async def generate(self, _: TextRequest) -> AsyncGenerator[TextChunk, None]:
            open_.append(1)
            try:
                yield TextChunk("a", 1, 1)
                yield TextChunk("b", 1, 2, "stop")
                yield TextChunk("never", 1, 3)
            finally:
                open_.pop()

    async def leave() -> None:
        target = Target("tiny", ServedBase(site.base, Longwinded()), tenant, None, 0.0, "")  # type: ignore[arg-type]
        gateway = SimpleNamespace(
            usage_tracker=UsageTracker(),
            traffic=SimpleNamespace(add=None),
            shadows=SimpleNamespace(copy=lambda *_: None),
        )
        caller = SimpleNamespace(limits=None)
        request = TextRequest("1", tenant, prompt="a")
        async with admitted(gateway, caller, target, [request]) as admission:  # type: ignore[arg-type]
            for _ in range(read):
                await anext(admission.chunks)
            assert open_ == [1] * bool(read)

    asyncio.run(leave())
    assert not open_
    assert scrape().codes(tenant) == {code: 1}


def test_a_made_up_name_is_not_a_label(client: OpenAI, http: httpx.Client, tenant: str, scrape: Any) -> None:
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model=f"{tenant}/made-up", messages=HELLO)
    http.request("MADEUP", "/v1/made-up")
    http.get("/v1/files/made-up")
    assert "made-up" not in scrape().text and "MADEUP" not in scrape().text


# -- all requests ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "endpoint", "code"),
    [
        ("GET", "/v1/models", "/v1/models", "200"),
        ("GET", "/v1/models/tiny", "/v1/models/{model:path}", "200"),
        ("GET", "/v1/files/file-1", "/v1/files/{file_id}", "404"),
        ("DELETE", "/v1/models", "/v1/models", "405"),
        ("POST", "/v1/chat/completions", "/v1/chat/completions", "400"),
        ("GET", "/v1/nothing", "(none)", "404"),
        ("GET", "/healthz", "/healthz", "200"),
    ],
)
def test_requests_of_all_kinds(
    http: httpx.Client, scrape: Any, method: str, path: str, endpoint: str, code: str
) -> None:
    before = scrape()("http_requests_total", endpoint=endpoint, code=code)
    http.request(method, path)
    assert scrape()("http_requests_total", endpoint=endpoint, code=code) == before + 1


def test_requests_without_a_key(site: Any, scrape: Any) -> None:
    before = scrape()("http_requests_total", endpoint="(none)", code="401")
    with site.http() as anonymous:
        anonymous.get("/v1/models")
    assert scrape()("http_requests_total", endpoint="(none)", code="401") == before + 1
