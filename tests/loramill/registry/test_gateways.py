"""Two gateways on one registry, on SQLite and PostgreSQL: a change by one reaches the other within a second."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from loramill.models.catalog import Base
from loramill.names import AdapterName
from loramill.registry import Registry, adapters, api_keys, tenants, usage
from loramill.serve.api.app import build_api
from loramill.serve.replica.fake import EchoBackend
from loramill.settings import Settings
from loramill.types import VersionRecord

from ...serve.api.conftest import byte_tokenizer, running
from ...waiting import eventually

VERSIONS = ("1" * 64, "2" * 64)


@pytest.fixture
def gateways(registry: Registry, database_url: str, tmp_path: Path) -> Iterator[list[str]]:
    """Addresses of two gateways, each with connections of its own."""
    settings = Settings(home=tmp_path, cache=tmp_path)
    base = Base("tiny", tmp_path, hashlib.sha256(b"tiny").hexdigest(), "LlamaForCausalLM", 512)
    with registry.writing() as session:
        tenants.create(session, "acme")
        adapters.get_or_create(session, AdapterName.parse("acme/a"))
        for version in VERSIONS:
            record = VersionRecord(
                id=version, adapter="acme/a", job=None, base=base.fingerprint, bytes=1, created_at=1.0
            )
            adapters.add_version(session, record)
    with ExitStack() as stack:
        addresses = []
        for _ in range(2):
            own = Registry.open(database_url, (tmp_path / "artifacts").as_uri())
            stack.callback(own.close)
            app = build_api(
                registry=own, base=base, tokenizer=byte_tokenizer(), backend=EchoBackend(), settings=settings
            )
            addresses.append(stack.enter_context(running(app)))
        yield addresses


def test_a_change_reaches_the_other_gateway_within_a_second(registry: Registry, gateways: list[str]) -> None:
    with registry.writing() as session:
        key, secret = api_keys.create(session, "acme")
        _, root = api_keys.create(session, None)

    def client_of(address: str, secret: str) -> httpx.Client:
        return httpx.Client(base_url=address, headers={"authorization": f"Bearer {secret}"}, trust_env=False)

    def complete(client: httpx.Client) -> httpx.Response:
        return client.post("/v1/completions", json={"model": "acme/a", "prompt": "a b", "max_tokens": 1})

    first, second = gateways
    with client_of(first, root) as admin, client_of(first, secret) as local, client_of(second, secret) as remote:
        for version, verb, body in (
            (VERSIONS[1], "promote", {"version": "challenger"}),
            (VERSIONS[0], "rollback", None),
        ):
            assert complete(remote).headers["x-loramill-version"] != version
            admin.post(f"/v1/adapters/acme/a/{verb}", json=body).raise_for_status()
            # The gateway that made the change uses it immediately.
            assert complete(local).headers["x-loramill-version"] == version
            time.sleep(1.0)
            assert complete(remote).headers["x-loramill-version"] == version
        admin.post(
            "/v1/tenants/acme/limits", json={"concurrent_requests": 5, "requests_per_minute": 60}
        ).raise_for_status()
        assert complete(local).headers["x-ratelimit-remaining-requests"] == "59"
        own = metered = 0

        def remote_counts_the_local_request() -> bool:
            nonlocal own, metered
            time.sleep(0.2)
            left = complete(remote).headers.get("x-ratelimit-remaining-requests")
            own += 1
            # The remote gateway may still have the tenant without limits in its cache; then it counts no request.
            metered += left is not None
            assert left in (None, str(60 - metered), str(59 - metered))
            return left == str(59 - metered)

        eventually(remote_counts_the_local_request)
        admin.delete(f"/v1/keys/{key.id}").raise_for_status()
        assert complete(local).status_code == 401
        time.sleep(1.0)
        assert complete(remote).status_code == 401

        def requests() -> int:
            return sum(row["requests"] for row in admin.get("/v1/usage").json()["data"])

        eventually(lambda: requests() == 7 + own)
        rows = admin.get("/v1/usage").json()["data"]
    assert {row["version"] for row in rows} == set(VERSIONS)
    with registry.reading() as session:
        assert usage.peer_windows(session, "nobody", minute=int(time.time() // 60), now=time.time()).keys() == {"acme"}
