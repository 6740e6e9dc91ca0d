"""Health, request ids, unknown URLs and unexpected errors."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest

from loramill.errors import Unavailable
from loramill.registry import Registry, migrate
from loramill.serve.api.app import build_api
from loramill.serve.api.middleware.body_limit import MAX_JSON_BYTES
from loramill.serve.api.routes import health
from loramill.serve.protocol import TextChunk, TextRequest
from loramill.serve.replica.fake import EchoBackend

from ....waiting import eventually


class NotReady(EchoBackend):
    """A backend that isn't up."""

    async def ready(self) -> None:
        raise Unavailable("No engine replica is up yet.")


class Silent(EchoBackend):
    """A backend whose readiness check never returns."""

    async def ready(self) -> None:
        import asyncio

        await asyncio.sleep(3600)


def test_health_needs_no_key(site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with site.http() as http:
        assert http.get("/healthz").json() == {"status": "ok"}
        assert http.get("/readyz").json() == {"status": "ready"}
        site.backend.now = NotReady()
        response = http.get("/readyz")
        assert response.status_code == 503 and "No engine replica" in response.json()["error"]["message"]
        site.backend.now = Silent()
        monkeypatch.setattr(health, "READY_TIMEOUT_SECONDS", 0.05)
        assert http.get("/readyz").status_code == 503
        assert http.get("/healthz").status_code == 200
        assert http.get("/health").status_code == 503
        site.backend.now = EchoBackend()
        assert http.get("/health").status_code == 200  # guidellm requests it first
        assert http.get("/openapi.json").json()["info"]["title"] == "loramill"
        assert http.get("/docs").status_code == 200


def test_not_ready_without_its_database(site: Any, serving: Callable[..., Any], tmp_path: Any) -> None:
    url = f"sqlite:///{tmp_path / 'own.db'}"
    migrate(url)
    registry = Registry.open(url, str(tmp_path / "artifacts"))
    app = build_api(
        registry=registry, base=site.base, tokenizer=site.tokenizer, backend=EchoBackend(), settings=site.settings
    )
    with serving(app) as address, httpx.Client(base_url=address, trust_env=False) as http:
        assert http.get("/readyz").status_code == 200
        # The connections stay open: over an open one, SQLite answers SELECT 1 without reading the file.
        (tmp_path / "own.db").write_bytes(b"this is not a database" * 1000)
        response = http.get("/readyz")
        assert response.status_code >= 500
        assert "Traceback" not in response.text and response.json()["error"]["message"]
        assert http.get("/healthz").status_code == 200


def test_a_browser_finds_the_description_without_a_key(site: Any) -> None:
    with site.http(accept="text/html") as http:
        assert http.get("/favicon.ico").status_code == 204
        response = http.get("/", follow_redirects=True)
    assert (response.status_code, response.url.path) == (200, "/docs")
    assert response.headers["content-type"].startswith("text/html")


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [("GET", "/v1/nothing", 404, "unknown_url"), ("DELETE", "/v1/models", 405, "method_not_allowed")],
)
def test_unknown_urls_in_openai_form(http: httpx.Client, method: str, path: str, status: int, code: str) -> None:
    response = http.request(method, path)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_request_ids_differ_and_are_in_the_log(
    http: httpx.Client, tenant: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "loramill.access"):
        ids = [http.get("/v1/models").headers["x-request-id"] for _ in range(2)]
        eventually(lambda: len(caplog.records) >= 2)  # a record follows the last byte of its answer
    assert len(set(ids)) == 2
    assert [(record.request, record.tenant, record.status) for record in caplog.records] == [  # type: ignore[attr-defined]
        (ids[0], tenant, 200),
        (ids[1], tenant, 200),
    ]


class Broken(EchoBackend):
    """A backend with a defect."""

    async def generate(self, request: TextRequest) -> AsyncIterator[TextChunk]:
        raise ZeroDivisionError("a secret")
        yield


def test_an_unexpected_error_is_logged_under_its_request_id_and_not_sent(
    site: Any, http: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    site.backend.now = Broken()
    response = http.post("/v1/completions", json={"model": "tiny", "prompt": "x"})
    request_id = response.headers["x-request-id"]
    error = response.json()["error"]
    assert (response.status_code, error["type"], error["code"]) == (500, "server_error", "internal_error")
    assert request_id in error["message"] and "secret" not in response.text
    assert any(record.exc_info and request_id in record.getMessage() for record in caplog.records)


def test_json_bodies_are_bounded(http: httpx.Client) -> None:
    body = {"model": "tiny", "prompt": "x" * MAX_JSON_BYTES}
    response = http.post("/v1/completions", json=body)
    assert response.status_code == 413 and "16 MiB" in response.json()["error"]["message"]
    assert http.get("/v1/models").status_code == 200
