"""Retention over HTTP and by commands: the policy of an adapter, what is removed, and the error about what was."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from loramill.client import Client
from loramill.errors import VersionPruned
from loramill.types import RetentionPolicy

from ....loramill.cli.running import clear_settings, json_output, loramill, ok

HELLO: Any = [{"role": "user", "content": "one two three"}]


@pytest.fixture
def versions(site: Any, tenant: str) -> list[str]:
    """A champion, a version that nothing refers to, and a challenger."""
    return [site.publish(f"{tenant}/support", f"{tenant} {number}") for number in range(3)]


def test_a_version_is_pruned_and_then_answered_with_a_clear_error(
    client: OpenAI, http: httpx.Client, tenant: str, versions: list[str]
) -> None:
    name = f"{tenant}/support"
    own = http.post(f"/v1/adapters/{name}/retention", json={"retention": {"keep_versions": 1}}).json()
    assert own["retention"] == RetentionPolicy(keep_versions=1).model_dump()
    planned = http.post("/v1/adapters/prune", json={"dry_run": True}).json()
    assert [(each["version"], each["reason"], each["object"]) for each in planned["data"]] == [
        (versions[1], "not its adapter's newest version", "adapter.removal")
    ]
    assert len(http.get(f"/v1/adapters/{name}").json()["versions"]) == 3
    assert http.post("/v1/adapters/prune").json()["data"] == planned["data"]
    assert [each["id"] for each in http.get(f"/v1/adapters/{name}").json()["versions"]] == [versions[2], versions[0]]
    with pytest.raises(openai.NotFoundError) as pruned:
        client.chat.completions.create(model=f"{name}@{versions[1][:12]}", messages=HELLO)
    assert pruned.value.code == "version_pruned"
    assert "retention removed it on" in pruned.value.message and "Use an alias" in pruned.value.message
    assert client.chat.completions.create(model=f"{name}@{versions[2]}", messages=HELLO).choices
    by_action = {each["action"]: each for each in http.get("/v1/audit").json()["data"]}
    assert by_action["adapter.retention"]["details"] == {"retention": {"keep_versions": 1}}
    assert by_action["adapter.prune"]["details"] == {"versions": [versions[1]]}


def test_the_settings_keep_everything_by_default(http: httpx.Client, tenant: str, versions: list[str]) -> None:
    name = f"{tenant}/support"
    http.post(f"/v1/adapters/{name}/retention", json={"retention": {"keep_versions": 1}})
    reset = http.post(f"/v1/adapters/{name}/retention", json={}).json()
    assert reset["retention"] is None
    assert http.post("/v1/adapters/prune").json()["data"] == []


@pytest.mark.parametrize(
    "terms", [{"keep_versions": 0}, {"version_days": 0}, {"keep_checkpoints": 4}, {"days": 3}, {"keep_versions": "3"}]
)
def test_an_invalid_retention_is_refused(http: httpx.Client, tenant: str, versions: list[str], terms: Any) -> None:
    refused = http.post(f"/v1/adapters/{tenant}/support/retention", json={"retention": terms})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, f"retention.{next(iter(terms))}")


def test_a_tenant_prunes_its_own_adapters_only(
    http: httpx.Client, site: Any, tenant: str, other: str, versions: list[str]
) -> None:
    for number in range(3):
        site.publish(f"{other}/support", f"{other} {number}")
    assert http.post(f"/v1/adapters/{other}/support/retention", json={}).status_code == 403
    with site.http(site.admin_key) as admin:
        for name in (f"{tenant}/support", f"{other}/support"):
            admin.post(f"/v1/adapters/{name}/retention", json={"retention": {"keep_versions": 1}})
    assert [each["adapter"] for each in http.post("/v1/adapters/prune").json()["data"]] == [f"{tenant}/support"]
    with site.http(site.admin_key) as admin:
        assert f"{other}/support" in [each["adapter"] for each in admin.post("/v1/adapters/prune").json()["data"]]


def test_the_commands_set_list_and_remove(
    site: Any, tenant: str, versions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"{tenant}/support"
    clear_settings(monkeypatch)
    monkeypatch.setenv("LORAMILL_URL", site.url)
    monkeypatch.setenv("LORAMILL_API_KEY", site.key(tenant))
    assert "of the settings" in ok("adapters", "retention", name).output
    assert "keep_versions  1" in ok("adapters", "retention", name, "--keep-versions", "1").stdout
    for wrong in (("--keep-versions", "1", "--keep-all"), ("--keep-versions", "0"), ("--version-days", "nan")):
        assert loramill("adapters", "retention", name, *wrong).exit_code == 2
    assert [each["version"] for each in json_output("adapters", "prune", "--dry-run")] == [versions[1]]
    shown = ok("adapters", "prune", "--dry-run")
    assert versions[1][:8] in shown.stdout and "1 B" in shown.stdout and "newest version" in shown.stdout
    assert loramill("adapters", "prune").exit_code == 2  # it can't be confirmed without a terminal
    assert "1 version removed" in ok("adapters", "prune", "--yes").output
    assert "Nothing to remove" in ok("adapters", "prune").output
    assert "everything" in ok("adapters", "retention", name, "--keep-all").output
    assert json_output("adapters", "retention", name, "--default")["retention"] is None
    with Client(site.url, api_key=site.key(tenant)) as client, pytest.raises(VersionPruned):
        client.adapters.delete_version(name, versions[1])
