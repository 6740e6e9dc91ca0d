"""`client.feedback`, `loramill feedback` and `loramill tenant storage`, on the real gateway."""

from __future__ import annotations

import json

import pytest

from loramill import errors

from ...conftest import RunningGateway
from ..running import json_output, loramill, ok, use_gateway


@pytest.fixture(autouse=True)
def environment(gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    use_gateway(monkeypatch, gateway)


@pytest.fixture
def stored(gateway: RunningGateway, tenant: str) -> list[str]:
    """IDs of stored completions of two users."""
    assert "no" in ok("tenant", "storage", tenant).stdout
    assert json_output("tenant", "storage", tenant, "--store", "--days", "7")["completion_days"] == 7
    assert "7" in ok("tenant", "storage", tenant).stdout
    with gateway.client() as admin:
        base, key = admin.models()[0], admin.keys.create(tenant).key
    with gateway.client(key) as client, client.openai() as own:
        hello = [{"role": "user", "content": "hello"}]
        return [
            own.chat.completions.create(model=base, messages=hello, store=True, user=user).id  # type: ignore[arg-type]
            for user in ("ann", "bob")
        ]


def test_the_client_gives_lists_and_deletes_feedback(gateway: RunningGateway, tenant: str, stored: list[str]) -> None:
    with gateway.client() as client:
        given = client.feedback.give(stored[0], rating="bad", correction="hi", reason="cold")
        assert (given.rating, given.correction, given.tenant) == ("bad", "hi", tenant)
        client.feedback.give(stored[1], rating="good")
        newest, oldest = client.feedback.list(tenant=tenant, texts=True)
        assert (newest.rating, oldest.correction, oldest.texts and oldest.texts.answer["role"]) == (  # type: ignore[index]
            "good",
            "hi",
            "assistant",
        )
        assert [each.user for each in client.feedback.list(tenant=tenant, user="ann")] == ["ann"]
        assert client.feedback.delete(stored[1]).feedback == 1
        assert client.feedback.delete_user("ann", tenant=tenant).completions == 1
        with pytest.raises(errors.NotFound):
            client.feedback.give(stored[0], rating="good")


def test_feedback_from_the_command_line(gateway: RunningGateway, tenant: str, stored: list[str]) -> None:
    assert "No feedback yet" in ok("feedback", "list", "--tenant", tenant).stderr
    with gateway.client() as client:
        for id_ in stored:
            client.feedback.give(id_, rating="good", reason="kind")
    listed = ok("feedback", "--tenant", tenant).stdout
    assert stored[0] in listed and "kind" in listed and "hello" not in listed
    assert [row["user"] for row in json_output("feedback", "list", "--tenant", tenant, "--user", "ann")] == ["ann"]
    exported = [json.loads(line) for line in ok("feedback", "export", "--tenant", tenant).stdout.splitlines()]
    assert [row["texts"]["messages"][0]["content"] for row in exported] == ["hello", "hello"]
    assert loramill("feedback", "delete", "--yes").exit_code == 2
    ran = ok("feedback", "delete", "--completion", stored[0], "--yes")
    assert ran.stderr == "Deleted 0 completions, and the feedback on 1 answer.\n"
    ran = ok("feedback", "delete", "--user", "bob", "--tenant", tenant, "--yes")
    assert ran.stderr == "Deleted 1 completion, and the feedback on 1 answer.\n"
    assert loramill("tenant", "storage", tenant, "--days", "x").exit_code == 2
