"""Pages of other origins may call the gateway only if the settings list them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from loramill.serve.api.app import build_api
from loramill.serve.protocol import TextChunk, TextRequest
from loramill.serve.replica.fake import EchoBackend
from loramill.settings import ServeSettings

PAGE = "https://app.example"
PREFLIGHT = {
    "origin": PAGE,
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization, content-type, x-stainless-lang",
}


class Broken(EchoBackend):
    """A backend with a defect."""

    async def generate(self, request: TextRequest) -> AsyncIterator[TextChunk]:
        raise ZeroDivisionError
        yield


@pytest.fixture
def page(site: Any, serving: Callable[..., Any]) -> Iterator[httpx.Client]:
    """A gateway that lists the page's origin."""
    serve = site.settings.serve.model_copy(update={"cors_origins": (PAGE,)})
    settings = site.settings.model_copy(update={"serve": serve})
    app = build_api(
        registry=site.registry, base=site.base, tokenizer=site.tokenizer, backend=site.backend, settings=settings
    )
    with serving(app) as url, httpx.Client(base_url=url, trust_env=False) as http:
        yield http


def test_a_listed_page_may_call(page: httpx.Client, site: Any, tenant: str) -> None:
    preflight = page.options("/v1/chat/completions", headers=PREFLIGHT)
    assert preflight.status_code == 200 and preflight.headers["x-request-id"]
    assert preflight.headers["access-control-allow-origin"] == PAGE
    assert "authorization" in preflight.headers["access-control-allow-headers"]
    assert "POST" in preflight.headers["access-control-allow-methods"]
    key = {"authorization": f"Bearer {site.key(tenant)}", "origin": PAGE}
    answer = page.post("/v1/completions", json={"model": "tiny", "prompt": "x"}, headers=key)
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, PAGE)
    assert "x-request-id" in answer.headers["access-control-expose-headers"]


def test_a_listed_page_reads_errors_too(page: httpx.Client, site: Any, tenant: str) -> None:
    refused = page.get("/v1/models", headers={"origin": PAGE})
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, PAGE)
    site.backend.now = Broken()
    key = {"authorization": f"Bearer {site.key(tenant)}", "origin": PAGE}
    defect = page.post("/v1/completions", json={"model": "tiny", "prompt": "x"}, headers=key)
    assert (defect.status_code, defect.headers["access-control-allow-origin"]) == (500, PAGE)


@pytest.mark.parametrize("origin", ["https://other.example", "http://app.example", "https://app.example.evil", "null"])
def test_another_page_needs_a_key_even_for_its_preflight(page: httpx.Client, origin: str) -> None:
    preflight = page.options("/v1/models", headers=PREFLIGHT | {"origin": origin})
    assert preflight.status_code == 401 and "access-control-allow-origin" not in preflight.headers


def test_no_page_is_listed_by_default(site: Any) -> None:
    with site.http() as http:
        preflight = http.options("/v1/models", headers=PREFLIGHT)
    assert preflight.status_code == 401 and "access-control-allow-origin" not in preflight.headers


@pytest.mark.parametrize("origin", ["https://app.example/", "app.example", "https://app.example/page", ""])
def test_malformed_origins_are_refused(origin: str) -> None:
    with pytest.raises(ValidationError):
        ServeSettings(cors_origins=(origin,))
    assert ServeSettings(cors_origins=("*", "http://localhost:3000", "tauri://localhost"))
