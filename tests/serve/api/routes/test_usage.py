"""The usage of generations: what is counted, for which tenant, and that the registry stores it."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from openai import OpenAI

from loramill.errors import Unavailable
from loramill.registry import Registry, api_keys, migrate, tenants, usage
from loramill.registry.usage import UsageCount, UsageItem
from loramill.serve.api.app import build_api
from loramill.serve.api.limits import flush
from loramill.serve.replica.fake import EchoBackend

from ....waiting import eventually

HELLO: Any = [{"role": "user", "content": "one two three"}]


def rows(site: Any, tenant: str) -> dict[tuple[str, str | None], tuple[int, int, int]]:
    """A tenant's usage in the registry, by model and version."""
    with site.http(site.admin_key) as http:
        found = http.get("/v1/usage", params={"tenant": tenant}).json()["data"]
    return {
        (row["model"], row["version"]): (row["requests"], row["prompt_tokens"], row["completion_tokens"])
        for row in found
    }


def test_usage_is_the_sum_of_the_answers(site: Any, client: OpenAI, tenant: str, flushed: Callable[..., None]) -> None:
    name = f"{tenant}/a"
    first = site.publish(name, f"{tenant} one")
    create = client.chat.completions.create
    reported = [
        create(model=name, messages=HELLO).usage,
        create(model=f"{name}@{first[:10]}", messages=HELLO, n=3).usage,
    ]
    *_, last = create(model=name, messages=HELLO, stream=True, stream_options={"include_usage": True})
    reported.append(last.usage)
    plain = client.completions.create(model="tiny", prompt=["a", "a", "b c"], n=2, max_tokens=1).usage
    flushed(site)
    assert rows(site, tenant) == {
        (name, first): (
            3,
            sum(each.prompt_tokens for each in reported),
            sum(each.completion_tokens for each in reported),
        ),
        ("tiny", None): (1, plain.prompt_tokens, plain.completion_tokens),
    }
    assert plain.prompt_tokens == 4


def test_refused_requests_are_not_counted_and_abandoned_ones_are(
    site: Any, http: httpx.Client, tenant: str, flushed: Callable[..., None]
) -> None:
    site.backend.now = EchoBackend(seconds_per_token=0.05)
    body = {"model": "tiny", "messages": [{"role": "user", "content": "w " * 200}], "stream": True}
    with http.stream("POST", "/v1/chat/completions", json=body) as answer:
        for number, _ in enumerate(answer.iter_lines()):
            if number > 6:
                break
    assert http.post("/v1/chat/completions", json=body | {"model": "nothing"}).status_code == 404
    eventually(lambda: not site.backend.now.active)
    flushed(site)
    [(requests, prompt, completion)] = rows(site, tenant).values()
    assert (requests, prompt) == (1, 200) and 1 <= completion < 100


def test_the_engine_gets_the_tenant(site: Any, tenant: str, other: str, echo: EchoBackend) -> None:
    for name in (tenant, other):
        site.publish(f"{name}/a", f"{name} one")
    for key, model in (
        (site.key(tenant), f"{tenant}/a"),
        (site.key(tenant), "tiny"),
        (site.key(other), "tiny"),
        (site.admin_key, "tiny"),
        (site.admin_key, f"{other}/a"),
    ):
        with site.openai(key) as client:
            client.chat.completions.create(model=model, messages=HELLO)
            client.completions.create(model=model, prompt="x")
    assert [request.tenant for request in echo.requests[::2]] == [tenant, tenant, other, "", other]
    assert [request.tenant for request in echo.requests[1::2]] == [tenant, tenant, other, "", other]


def test_usage_by_day(site: Any, http: httpx.Client, tenant: str, other: str) -> None:
    today = datetime.now(UTC).date()
    days = [(today - timedelta(back)).isoformat() for back in (0, 29, 30, 400)]
    counts = {UsageItem(name, day, "tiny", ""): UsageCount(1, 2, 3) for name in (tenant, other) for day in days}
    with site.registry.writing() as session:
        usage.record_batch(session, f"test-{tenant}", 1, counts, {}, now=time.time())

    def shown(http: httpx.Client, **query: str) -> list[str]:
        found = http.get("/v1/usage", params=query).json()["data"]
        return [row["day"] for row in found if row["tenant"] in (tenant, other)]

    assert shown(http) == days[:2]
    assert shown(http, tenant=tenant, **{"from": days[3], "to": days[2]}) == days[2:]
    assert shown(http, to=days[2]) == [days[2]]
    with site.http(site.admin_key) as admin:
        assert shown(admin) == [days[0], days[0], days[1], days[1]]
        assert shown(admin, tenant=other) == days[:2]
        assert admin.get("/v1/usage", params={"tenant": "unknown"}).status_code == 404
    assert http.get("/v1/usage", params={"tenant": other}).status_code == 403
    for query in ({"from": "yesterday"}, {"from": days[0], "to": days[1]}, {"days": "3"}, {"to": "0001-01-01"}):
        assert http.get("/v1/usage", params=query).status_code == (200 if "0001-01-01" in query.values() else 400)


def test_the_last_batch_is_written_at_the_end_and_a_failed_one_later(
    site: Any, serving: Callable[..., Any], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"sqlite:///{tmp_path / 'own.db'}"
    migrate(url)
    registry = Registry.open(url, str(tmp_path / "artifacts"))
    with registry.writing() as session:
        tenants.create(session, "acme")
        _, secret = api_keys.create(session, "acme")
    app = build_api(
        registry=registry, base=site.base, tokenizer=site.tokenizer, backend=EchoBackend(), settings=site.settings
    )
    exchange, failures = flush._write_and_read_peers, []

    def failing(written: Registry, gateway: str, batch: Any) -> Any:
        # The other tests' gateway writes its usage in this process, too.
        if written is not registry or batch is None or not batch.counts or len(failures) == 2:
            return exchange(written, gateway, batch)
        if failures:
            exchange(written, gateway, batch)  # it is written, but reported as failed
        failures.append(batch.number)
        raise Unavailable("away")

    monkeypatch.setattr(flush, "_write_and_read_peers", failing)
    with serving(app) as address, httpx.Client(base_url=address, headers={"authorization": f"Bearer {secret}"}) as http:
        for failed in (0, 1, 2):
            eventually(lambda failed=failed: len(failures) >= failed)  # type: ignore[misc]
            http.post("/v1/completions", json={"model": "tiny", "prompt": "a b"}).raise_for_status()
        http.post("/v1/completions", json={"model": "tiny", "prompt": "a b"}).raise_for_status()
    assert failures == [1, 1]
    with registry.reading() as session:
        [row] = usage.daily(session, "acme", "2000-01-01", "2999-01-01")
    assert (row.requests, row.prompt_tokens, row.completion_tokens) == (4, 8, 8)
    registry.close()
