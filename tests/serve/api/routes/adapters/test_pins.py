"""Pinning a champion, and warming a version up."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from loramill.serve.replica.fake import EchoBackend


@pytest.fixture
def versions(site: Any, tenant: str) -> list[str]:
    """Three versions of an adapter `a`: the champion, an older challenger, the challenger."""
    return [site.publish(f"{tenant}/a", f"{tenant} {number}") for number in range(3)]


def test_a_pinned_champion_stays(http: httpx.Client, tenant: str, versions: list[str]) -> None:
    path = f"/v1/adapters/{tenant}/a"
    http.post(f"{path}/promote", json={"version": versions[1]}).raise_for_status()
    pinned = http.post(f"{path}/pin").json()
    assert (pinned["champion"], pinned["pinned"]) == (versions[1], True)
    for verb, body in (("promote", {"version": "challenger"}), ("rollback", None), ("pin", {"version": versions[2]})):
        refused = http.post(f"{path}/{verb}", json=body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "conflict")
        assert "adapters unpin" in refused.json()["error"]["message"]
    assert http.post(f"{path}/promote", json={"version": "champion"}).status_code == 200  # nothing moves
    assert http.post(f"{path}/pin").json() == http.get("/v1/adapters").json()["data"][0]
    assert http.post(f"{path}/unpin").json()["pinned"] is False
    assert http.post(f"{path}/promote", json={"version": "challenger"}).json()["champion"] == versions[2]


def test_pinning_a_version_makes_it_the_champion(http: httpx.Client, tenant: str, versions: list[str]) -> None:
    pinned = http.post(f"/v1/adapters/{tenant}/a/pin", json={"version": versions[1][:9]}).json()
    assert (pinned["champion"], pinned["previous"], pinned["pinned"]) == (versions[1], versions[0], True)


def test_warming_generates_one_token_with_the_version(
    site: Any, http: httpx.Client, tenant: str, versions: list[str], echo: EchoBackend
) -> None:
    for body, version in (
        (None, versions[0]),
        ({"version": "challenger"}, versions[2]),
        ({"version": versions[1]}, versions[1]),
    ):
        answer = http.post(f"/v1/adapters/{tenant}/a/warm", json=body).json()
        assert (answer["adapter"], answer["version"]) == (f"{tenant}/a", version)
        assert answer["seconds"] >= 0
        request = echo.requests[-1]
        assert (request.version, request.tenant, request.sampling_params.max_tokens) == (version, tenant, 1)


@pytest.mark.parametrize("verb", ["pin", "unpin", "warm"])
def test_unknown_adapters_and_versions_are_refused(http: httpx.Client, site: Any, tenant: str, verb: str) -> None:
    missing = http.post(f"/v1/adapters/{tenant}/none/{verb}")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")
    site.publish(f"{tenant}/a", f"{tenant} one")
    if verb != "unpin":
        unknown = http.post(f"/v1/adapters/{tenant}/a/{verb}", json={"version": "0123456789"})
        assert (unknown.status_code, unknown.json()["error"]["param"]) == (400, "version")
        wrong = http.post(f"/v1/adapters/{tenant}/a/{verb}", json={"replicas": 2})
        assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "replicas")
