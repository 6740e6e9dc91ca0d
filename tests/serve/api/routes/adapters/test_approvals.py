"""What waits for approval after a nightly run, and its answer through the API and the client."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from loramill.client import Client
from loramill.errors import Conflict, Forbidden, NotFound
from loramill.pipelines.nightly.report.summarize import APPROVAL_PAGE
from loramill.registry import api_keys
from loramill.types import Approval, ApprovalState, Scope

from .....loramill.registry.waiting_challengers import ask


@pytest.fixture
def versions(site: Any, tenant: str) -> tuple[str, str]:
    return site.publish(f"{tenant}/a", f"{tenant} one"), site.publish(f"{tenant}/a", f"{tenant} two")


@pytest.fixture
def pending(site: Any, tenant: str, versions: tuple[str, str]) -> Approval:
    with site.registry.writing() as session:
        return ask(session, f"{tenant}/a", versions[1], versions[0])


@pytest.fixture
def own(site: Any, tenant: str) -> Iterator[Client]:
    with Client(site.url, api_key=site.key(tenant)) as client:
        yield client


def test_a_tenant_lists_and_approves_its_challenger(
    own: Client, http: httpx.Client, tenant: str, pending: Approval, versions: tuple[str, str]
) -> None:
    assert own.adapters.list_approvals() == [pending]
    decided = own.adapters.approve(f"{tenant}/a", pending.run, "good answers")
    assert (decided.state, decided.note) == (ApprovalState.APPROVED, "good answers")
    assert own.adapters.get(f"{tenant}/a").champion == versions[1]
    assert own.adapters.list_approvals() == []
    (entry,) = [each for each in http.get("/v1/audit").json()["data"] if each["action"] == "adapter.approve"]
    assert entry["subject"] == f"{tenant}/a" and entry["key"] == decided.decided_by
    assert entry["details"] == {"version": versions[1], "run": pending.run}
    with pytest.raises(Conflict, match="was approved by key-"):
        own.adapters.approve(f"{tenant}/a", pending.run)


def test_a_rejected_challenger_does_not_answer(
    own: Client, tenant: str, pending: Approval, versions: tuple[str, str]
) -> None:
    assert own.adapters.reject(f"{tenant}/a", pending.run).state is ApprovalState.REJECTED
    found = own.adapters.get(f"{tenant}/a")
    assert (found.champion, found.challenger) == (versions[0], None)


def test_of_two_who_approve_at_once_one_learns_of_the_other(
    http: httpx.Client, tenant: str, pending: Approval, versions: tuple[str, str]
) -> None:
    body = {"run": pending.run, "decision": "approve"}
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: http.post(f"/v1/adapters/{tenant}/a/approval", json=body), range(4)))
    assert sorted(each.status_code for each in answers) == [200, 409, 409, 409]
    history = http.get(f"/v1/adapters/{tenant}/a").json()["history"]
    assert [each["version"] for each in history if each["alias"] == "champion"] == [*versions[::-1]]


def test_another_champion_than_the_compared_one_is_a_conflict(
    own: Client, site: Any, tenant: str, pending: Approval
) -> None:
    third = site.publish(f"{tenant}/a", f"{tenant} three")
    own.adapters.promote(f"{tenant}/a", third)
    with pytest.raises(Conflict, match="--reject"):
        own.adapters.approve(f"{tenant}/a", pending.run)
    assert own.adapters.list_approvals() == [pending]


def test_what_others_ask_is_not_shown_and_not_decided(
    own: Client, site: Any, tenant: str, other: str, pending: Approval
) -> None:
    with Client(site.url, api_key=site.key(other)) as client:
        assert client.adapters.list_approvals() == []
        with pytest.raises(Forbidden):
            client.adapters.approve(f"{tenant}/a", pending.run)
    with Client(site.url, api_key=site.admin_key) as admin:
        assert pending in admin.adapters.list_approvals()
        assert admin.adapters.list_approvals(other) == []
    with site.registry.writing() as session:
        _, reader = api_keys.create(session, tenant, scopes=[Scope.READ])
    with Client(site.url, api_key=reader) as client:
        assert client.adapters.list_approvals() == [pending]
        with pytest.raises(Forbidden, match="adapters"):
            client.adapters.approve(f"{tenant}/a", pending.run)
    with pytest.raises(NotFound, match="waits for approval"):
        own.adapters.approve(f"{tenant}/a", "nightly-0")


def test_the_link_of_the_report_leads_to_the_request(http: httpx.Client) -> None:
    operation = http.get("/openapi.json").json()["paths"]["/v1/adapters/{tenant}/{adapter}/approval"]["post"]
    assert f"/docs#/{operation['tags'][0]}/{operation['operationId']}" == APPROVAL_PAGE
