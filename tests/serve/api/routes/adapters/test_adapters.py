"""Adapters: versions, promotion, rollback, new data. loramill's own API, so plain HTTP."""

from __future__ import annotations

import json
from typing import Any

import httpx
from openai import OpenAI

from loramill.registry import evaluations, nightly
from loramill.serve.replica.fake import EchoBackend

HELLO: Any = [{"role": "user", "content": "hi"}]


def test_promotion_changes_the_version_that_answers(
    client: OpenAI, http: httpx.Client, site: Any, tenant: str, echo: EchoBackend
) -> None:
    name = f"{tenant}/support"
    first, second = site.publish(name, f"{tenant} one"), site.publish(name, f"{tenant} two")

    def answering() -> str | None:
        client.chat.completions.create(model=name, messages=HELLO)
        return echo.requests[-1].version

    assert answering() == first
    promoted = http.post(f"/v1/adapters/{name}/promote", json={"version": "challenger"}).json()
    assert (promoted["champion"], promoted["previous"], promoted["challenger"]) == (second, first, None)
    assert answering() == second
    assert http.post(f"/v1/adapters/{name}/rollback").json()["champion"] == first
    assert answering() == first
    assert http.post(f"/v1/adapters/{name}/promote", json={"version": second[:8]}).json()["champion"] == second
    assert answering() == second


def test_everything_about_an_adapter(http: httpx.Client, site: Any, tenant: str) -> None:
    name = f"{tenant}/support"
    versions = [site.publish(name, f"{tenant} {number}") for number in range(3)]
    with site.registry.writing() as session:
        evaluations.add(session, name, versions[0], "file-x", "all", 10, {"exact_match": 0.5})
    shown = http.get(f"/v1/adapters/{name}").json()
    assert (shown["id"], shown["object"], shown["champion"]) == (name, "adapter", versions[0])
    assert [version["id"] for version in shown["versions"]] == versions[::-1]
    assert [(change["alias"], change["version"]) for change in shown["history"]][-1] == ("champion", versions[0])
    assert shown["evaluations"][0]["metrics"] == {"exact_match": 0.5}
    [listed] = http.get("/v1/adapters", params={"limit": 100}).json()["data"]
    assert listed["name"] == name and listed["challenger"] == versions[2]


def test_lists_contain_only_the_callers_adapters(http: httpx.Client, site: Any, tenant: str, other: str) -> None:
    site.publish(f"{other}/secret", f"{other} v1")
    assert http.get("/v1/adapters").json()["data"] == []
    with site.http(site.admin_key) as admin:
        assert f"{other}/secret" in [row["name"] for row in admin.get("/v1/adapters").json()["data"]]
        assert admin.get(f"/v1/adapters/{other}/secret").status_code == 200
    with site.http(site.admin_key, **{"OpenAI-Organization": tenant}) as admin:
        assert admin.get("/v1/adapters").json()["data"] == []


def test_unknown_names_of_the_own_tenant(http: httpx.Client, site: Any, tenant: str) -> None:
    missing = f"/v1/adapters/{tenant}/none"
    for response in (
        http.get(missing),
        http.post(f"{missing}/promote", json={"version": "challenger"}),
        http.post(f"{missing}/rollback"),
    ):
        assert (response.status_code, response.json()["error"]["code"]) == (404, "not_found")
    site.publish(f"{tenant}/support", f"{tenant} v1")
    known = f"/v1/adapters/{tenant}/support"
    refused = http.post(f"{known}/promote", json={"version": "0123456789ab"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "version")
    assert http.post(f"{known}/rollback").status_code == 409
    assert http.post(f"{known}/promote", json={}).json()["error"]["param"] == "version"
    assert http.get(f"/v1/adapters/{tenant}/Bad%20Name").status_code == 400


def test_data_for_the_next_nightly_run(
    client: OpenAI, http: httpx.Client, site: Any, tenant: str, other: str, jsonl: Any
) -> None:
    path = f"/v1/adapters/{tenant}/support/data"  # an adapter without a version yet: the nightly run makes the first
    mine = client.files.create(file=("a.jsonl", jsonl(5)), purpose="fine-tune").id
    foreign = site.openai(site.key(other)).files.create(file=("a.jsonl", jsonl(5)), purpose="fine-tune").id
    assert http.post(path, json={"training_file": mine, "validation_file": mine}).status_code == 200
    for param, body in {
        "training_file": {"training_file": foreign},
        "validation_file": {"training_file": mine, "validation_file": foreign},
    }.items():
        refused = http.post(path, json=body)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)
    with site.registry.reading() as session:
        waiting = [data for data in nightly.pending_data(session) if data.adapter == f"{tenant}/support"]
    assert len(waiting) == 1


def test_new_data_of_another_form_is_refused_when_it_is_added(
    client: OpenAI, http: httpx.Client, tenant: str, jsonl: Any
) -> None:
    pairs = b"".join(b'{"prompt": "p%d", "completion": "c%d"}\n' % (number, number) for number in range(12))
    chat = client.files.create(file=("chat.jsonl", jsonl(12)), purpose="fine-tune").id
    text = client.files.create(file=("text.jsonl", pairs), purpose="fine-tune").id

    def add(adapter: str, train: str, valid: str | None = None) -> httpx.Response:
        body = {"training_file": train} | ({"validation_file": valid} if valid else {})
        return http.post(f"/v1/adapters/{tenant}/{adapter}/data", json=body)

    assert add("forms", chat).status_code == 200
    for adapter, param, files in (
        ("forms", "training_file", (text,)),  # chat.jsonl waits there
        ("fresh", "validation_file", (chat, text)),
    ):
        refused = add(adapter, *files)
        error = refused.json()["error"]
        assert (refused.status_code, error["param"]) == (400, param)
        assert "chat.jsonl" in error["message"] and "text.jsonl" in error["message"]
    assert "`--columns instruction=prompt,output=completion`" in add("forms", text).json()["error"]["message"]
    assert add("forms", chat, chat).status_code == 200  # the refused data left nothing behind
    assert add("plain", text).status_code == 200


def test_preference_pairs_are_new_data_and_labels_are_not(
    client: OpenAI, http: httpx.Client, tenant: str, jsonl: Any
) -> None:
    chosen = [{"prompt": f"p{number}", "chosen": "good", "rejected": "bad"} for number in range(30)]
    labeled = [{"prompt": f"p{number}", "completion": "good", "label": True} for number in range(30)]
    pairs, labels = (
        client.files.create(file=(name, "\n".join(map(json.dumps, lines)).encode()), purpose="fine-tune").id
        for name, lines in (("pairs.jsonl", chosen), ("labels.jsonl", labeled))
    )
    path = f"/v1/adapters/{tenant}/rated/data"
    added = http.post(path, json={"training_file": pairs})
    assert added.status_code == 200 and added.json()["new_data"]["outlook"] == (
        "30 preference pairs, on which a nightly run trains after new examples, once there are as many as "
        "feedback.min_pairs of nightly.yaml, by default 20. They wait until the adapter has examples or a champion."
    )
    assert not added.json()["new_data"]["enough"]
    refused = http.post(path, json={"training_file": labels})
    assert refused.status_code == 400 and "--objective kto" in refused.json()["error"]["message"]
    chat = client.files.create(file=("chat.jsonl", jsonl(12)), purpose="fine-tune").id
    assert http.post(path, json={"training_file": chat, "validation_file": pairs}).status_code == 400, "two forms"
