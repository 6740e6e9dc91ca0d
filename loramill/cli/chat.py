"""`loramill chat`: a conversation with a model, or one question."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from loramill.cli import show
from loramill.client import Client


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command(rich_help_panel="Adapters")(chat)


def chat(
    model: Annotated[
        str, typer.Argument(help="A base, TENANT/ADAPTER, or TENANT/ADAPTER@VERSION.", show_default=False)
    ],
    message: Annotated[str | None, typer.Option("--message", "-m", help="Ask this one question.")] = None,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0: always the most probable token.")] = 0.0,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of an answer.")] = None,
) -> None:
    """Talk with a model; Ctrl-D ends. A question from a pipe is answered alone."""
    conversation = [{"role": "system", "content": system}] if system else []
    sampling: dict[str, Any] = {"temperature": temperature}
    if max_tokens is not None:
        sampling["max_tokens"] = max_tokens
    if message is None and not _is_typed():
        message = sys.stdin.read().strip()
    with Client() as client:
        if message is not None:
            _ask(client, model, [*conversation, {"role": "user", "content": message}], sampling)
            return
        show.say(f"{model} listens; Ctrl-D ends.", style="dim")
        while (question := _question()) is not None:
            conversation.append({"role": "user", "content": question})
            answer = _ask(client, model, conversation, sampling)
            conversation.append({"role": "assistant", "content": answer})


def _is_typed() -> bool:
    return sys.stdin.isatty()


def _question() -> str | None:
    try:
        return input("> ").strip()
    except EOFError:
        show.line("")
        return None


def _ask(client: Client, model: str, conversation: list[dict[str, str]], sampling: dict[str, Any]) -> str:
    pieces = []
    for piece in client.stream(model, conversation, **sampling):
        typer.echo(piece, nl=False)
        pieces.append(piece)
    show.line("")
    return "".join(pieces)
