"""Stored completions with OpenAI's client, ratings and corrections, and their deletion."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

HELLO: Any = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hello"}]


@pytest.fixture(autouse=True)
def consent(site: Any, tenant: str) -> None:
    site.publish(f"{tenant}/a", f"{tenant} one")
    with site.http(site.admin_key) as admin:
        assert admin.post(f"/v1/tenants/{tenant}/storage", json={"store_completions": True}).status_code == 200


def create(client: OpenAI, tenant: str, **more: Any) -> Any:
    return client.chat.completions.create(model=f"{tenant}/a", messages=HELLO, store=True, **more)


def test_openais_client_reads_changes_and_deletes_stored_completions(client: OpenAI, tenant: str) -> None:
    made = create(client, tenant, metadata={"topic": "greeting"}, user="ann", logprobs=True)
    stored = client.chat.completions.retrieve(made.id)
    assert (stored.id, stored.model, stored.created) == (made.id, f"{tenant}/a", made.created)
    assert stored.choices[0].message == made.choices[0].message and stored.usage == made.usage
    assert (stored.metadata, stored.user) == ({"topic": "greeting"}, "ann")  # type: ignore[attr-defined]
    assert stored.choices[0].logprobs is None
    messages = client.chat.completions.messages.list(made.id)
    assert [(each.role, each.content) for each in messages] == [("system", "Be kind."), ("user", "hello")]
    changed = client.chat.completions.update(made.id, metadata={"topic": "other"})
    assert changed.metadata == {"topic": "other"}  # type: ignore[attr-defined]
    assert client.chat.completions.delete(made.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.retrieve(made.id)


def test_openais_client_lists_stored_completions(client: OpenAI, http: httpx.Client, tenant: str) -> None:
    made = [create(client, tenant, metadata={"n": str(number)}).id for number in range(3)]
    other = client.chat.completions.create(model="tiny", messages=HELLO, store=True).id
    listed = client.chat.completions.list
    assert [each.id for each in listed(limit=2)] == [*made, other]
    assert [each.id for each in listed(order="desc", limit=1)] == [other, *made[::-1]]
    assert [each.id for each in listed(metadata={"n": "1"})] == [made[1]]
    assert [each.id for each in listed(model="tiny")] == [other]
    assert [each.id for each in listed(after=made[1])] == [made[2], other]
    page = client.chat.completions.messages.list(made[0], limit=1)
    assert [each.content for each in page] == ["Be kind.", "hello"]
    backwards = client.chat.completions.messages.list(made[0], order="desc")
    assert [each.content for each in backwards] == ["hello", "Be kind."]
    for query in ({"wibble": "1"}, {"order": "up"}, {'metadata["]': "x"}):
        assert http.get("/v1/chat/completions", params=query).status_code == 400


def test_a_text_completion_is_stored_with_its_prompts(client: OpenAI, http: httpx.Client, tenant: str) -> None:
    made = client.completions.create(model=f"{tenant}/a", prompt=["one", "two"], n=2, extra_body={"store": True})
    stream = client.completions.create(model="tiny", prompt="three", stream=True, extra_body={"store": True})
    streamed = "".join(chunk.choices[0].text for chunk in stream)
    first, second = http.get("/v1/completions").json()["data"]
    assert first["id"] == made.id and [each["text"] for each in first["choices"]] == [c.text for c in made.choices]
    assert second["choices"][0]["text"] == streamed
    assert http.get(f"/v1/completions/{made.id}").json() == first
    assert http.get(f"/v1/chat/completions/{made.id}").status_code == 404
    assert http.post("/v1/feedback", json={"completion_id": made.id, "choice": 3, "rating": -1}).status_code == 200
    [given] = http.get("/v1/feedback", params={"texts": "true"}).json()["data"]
    assert (given["rating"], given["texts"]["prompt"]) == ("bad", "two")
    assert http.delete(f"/v1/completions/{made.id}").json()["object"] == "text_completion.deleted"
    assert http.get("/v1/feedback").json()["data"] == []


def test_a_streamed_tool_call_is_stored_as_it_was_sent(site: Any, client: OpenAI) -> None:
    tool: Any = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    messages: Any = [{"role": "user", "content": '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'}]
    with client.chat.completions.create(
        model="tiny", messages=messages, tools=[tool], store=True, stream=True
    ) as stream:
        chunks = list(stream)
    sent = [call for chunk in chunks for each in chunk.choices for call in each.delta.tool_calls or ()]
    [choice] = client.chat.completions.retrieve(chunks[0].id).choices
    assert [call.id for call in choice.message.tool_calls or ()] == [call.id for call in sent]


def test_feedback_rates_and_corrects_and_the_latest_counts(client: OpenAI, http: httpx.Client, tenant: str) -> None:
    made = create(client, tenant, user="ann")
    first = http.post("/v1/feedback", json={"completion_id": made.id, "rating": 1}).json()
    assert (first["object"], first["rating"], first["user"]) == ("feedback", "good", "ann")
    assert first["adapter"] == f"{tenant}/a"
    again = http.post("/v1/feedback", json={"completion_id": made.id, "rating": "good"}).json()
    assert again == first
    body = {"completion_id": made.id, "rating": "bad", "correction": "hi there", "reason": "cold"}
    http.post("/v1/feedback", json=body)
    for query, expected in (({}, 1), ({"user": "ann"}, 1), ({"user": "bob"}, 0), ({"adapter": f"{tenant}/a"}, 1)):
        rows = http.get("/v1/feedback", params=query).json()["data"]
        assert len(rows) == expected and all(row["correction"] == "hi there" for row in rows)
    [row] = http.get("/v1/feedback", params={"texts": "true"}).json()["data"]
    assert row["texts"]["messages"] == HELLO and row["texts"]["answer"]["content"] == made.choices[0].message.content
    assert http.delete(f"/v1/feedback/{made.id}").json()["feedback"] == 1
    assert http.delete(f"/v1/feedback/{made.id}").status_code == 404
    assert client.chat.completions.retrieve(made.id).id == made.id


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"rating": None}, None),
        ({"rating": 2}, "rating"),
        ({"rating": True}, "rating"),
        ({"correction": " "}, None),
        ({"correction": "a\x00"}, "correction"),
        ({"reason": "a\x00"}, "reason"),
        ({"choice": 1}, "choice"),
        ({"wibble": 1}, "wibble"),
    ],
)
def test_invalid_feedback_is_refused(
    client: OpenAI, http: httpx.Client, tenant: str, change: dict[str, Any], param: str | None
) -> None:
    made = create(client, tenant)
    refused = http.post("/v1/feedback", json={"completion_id": made.id, "rating": "good"} | change)
    assert refused.status_code == 400, refused.text
    assert param is None or refused.json()["error"]["param"] == param
    assert http.get("/v1/feedback").json()["data"] == []


def test_a_users_data_is_deleted_and_no_one_elses(site: Any, client: OpenAI, http: httpx.Client, tenant: str) -> None:
    made = {user: create(client, tenant, user=user).id for user in ("ann", "bob")}
    for id_ in made.values():
        http.post("/v1/feedback", json={"completion_id": id_, "rating": 1})
    removed = http.delete("/v1/feedback", params={"user": "ann"}).json()
    assert (removed["completions"], removed["feedback"], removed["files"]) == (1, 1, [])
    assert [each.id for each in client.chat.completions.list()] == [made["bob"]]
    assert [row["user"] for row in http.get("/v1/feedback").json()["data"]] == ["bob"]
    assert http.delete("/v1/feedback").status_code == 400
    with site.http(site.admin_key) as admin:
        assert admin.delete("/v1/feedback", params={"user": "bob"}).status_code == 400
        acting = {"OpenAI-Organization": tenant}
        assert admin.delete("/v1/feedback", params={"user": "bob"}, headers=acting).json()["completions"] == 1


def test_storage_is_set_by_an_admin_and_audited(site: Any, http: httpx.Client, tenant: str) -> None:
    path = f"/v1/tenants/{tenant}/storage"
    assert http.post(path, json={"store_completions": False}).status_code == 403
    with site.http(site.admin_key) as admin:
        assert admin.post(path, json={"completion_days": 7}).json()["store_completions"] is True
        assert admin.post(path, json={"completion_days": "default"}).json()["completion_days"] is None
        assert admin.post(path, json={"completion_days": 0}).status_code == 400
        assert admin.post(path, json={"store_completions": False}).json()["store_completions"] is False
    newest = http.get("/v1/audit").json()["data"][0]
    assert (newest["action"], newest["details"]["store_completions"]) == ("tenant.storage", False)
    body = json.dumps({"model": "tiny", "messages": HELLO, "store": True})
    assert http.post("/v1/chat/completions", content=body).status_code == 400
