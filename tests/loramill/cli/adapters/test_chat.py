"""`loramill chat`: a conversation at a terminal, with a model that answers at once."""

from __future__ import annotations

from typing import Any

import pytest

from loramill import errors

from ...conftest import RunningGateway
from ..running import loramill, ok

pytestmark = pytest.mark.usefixtures("clean")


def test_an_interactive_chat_remembers(
    running_gateway: RunningGateway, tenant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversations: list[list[dict[str, str]]] = []

    def stream(_: Any, model: str, conversation: Any, **sampling: Any) -> Any:
        conversations.append([*conversation])
        yield from ("to ", conversation[-1]["content"])

    lines = iter(["one", "two"])

    def typed(_: str) -> str:
        for line in lines:
            return line
        raise EOFError

    monkeypatch.setattr("loramill.client.Client.stream", stream)
    monkeypatch.setattr("loramill.cli.adapters.chat._is_interactive", lambda: True)
    monkeypatch.setattr("builtins.input", typed)
    assert ok("chat", "smollm2-135m", "--system", "Be short.").stdout == "to one\nto two\n\n"
    assert [message["content"] for message in conversations[-1]] == ["Be short.", "one", "to one", "two"]


def test_an_interactive_chat_survives_a_stopped_answer(
    running_gateway: RunningGateway, tenant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversations: list[list[str]] = []

    def stream(_: Any, model: str, conversation: Any, **sampling: Any) -> Any:
        conversations.append([message["content"] for message in conversation])
        assert sampling == {"temperature": 0.5, "top_p": 0.9}
        yield "so "
        if conversations[-1][-1] == "long":
            raise KeyboardInterrupt
        if conversations[-1][-1] == "much":
            raise errors.Overloaded("Too much at once.")
        yield "far"

    lines = iter(["/help", "long", "", "much", "one", "/clear", "two", "/bye", "never"])
    monkeypatch.setattr("loramill.client.Client.stream", stream)
    monkeypatch.setattr("loramill.cli.adapters.chat._is_interactive", lambda: True)
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    ran = ok("chat", "smollm2-135m", "--temperature", "0.5", "--top-p", "0.9")
    assert conversations == [["long"], ["long", "so ", "much"], ["long", "so ", "one"], ["two"]]
    assert "/clear" in ran.stderr and "Stopped" in ran.stderr and "Too much at once." in ran.stderr


def test_a_chat_without_gateway_and_key_is_refused_with_the_fix() -> None:
    ran = loramill("chat", "smollm2-135m", "-m", "Hello")
    assert ran.exit_code == 1
    assert "Nothing answers at http://127.0.0.1:9: start it with `loramill up`" in ran.stderr
