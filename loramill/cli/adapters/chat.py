"""`loramill chat`: a conversation with a model, or one message."""

from __future__ import annotations

import sys
from contextlib import closing
from typing import Annotated, Any

import typer

from loramill.cli import complete
from loramill.cli.format import print_line, print_message
from loramill.cli.model_options import description_of
from loramill.client import Client
from loramill.errors import LoramillError
from loramill.submission.options import drop_none
from loramill.types.sampling import MaxTokens, Temperature, TopP

_COMMANDS_HELP = """/clear  start a new conversation
/bye    end the conversation (also Ctrl-D)
Ctrl-C  stop an answer"""


def chat(
    model: Annotated[
        str,
        typer.Argument(
            help="Base model, TENANT/ADAPTER, or TENANT/ADAPTER@VERSION.",
            show_default=False,
            autocompletion=complete.models,
        ),
    ],
    message: Annotated[
        str | None, typer.Option("--message", "-m", help="Send one message, print the answer and exit.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    temperature: Annotated[float, typer.Option(min=0, max=2, help=description_of(Temperature))] = 0.0,
    top_p: Annotated[float | None, typer.Option(min=0, max=1, help=description_of(TopP))] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help=description_of(MaxTokens))] = None,
) -> None:
    """Chat with a model until Ctrl-D. Piped input is sent as one message."""
    conversation = [{"role": "system", "content": system}] if system else []
    sampling = drop_none({"temperature": temperature, "top_p": top_p, "max_tokens": max_tokens})
    if message is None and not _is_interactive():
        message = sys.stdin.read().strip()
    with Client() as client:
        if message is not None:
            _ask(client, model, [*conversation, {"role": "user", "content": message}], sampling, [])
        else:
            _run_conversation(client, model, conversation, sampling)


def _run_conversation(client: Client, model: str, opening: list[dict[str, str]], sampling: dict[str, Any]) -> None:
    """Sends the user's messages until the input ends. Ctrl-C stops an answer; its text so far is kept."""
    print_message(f"Chatting with {model}; /help lists the commands, Ctrl-D ends.", style="dim")
    conversation = list(opening)
    while (question := _read_question()) is not None:
        match question:
            case "":
                continue
            case "/bye" | "/exit" | "/quit" | "exit" | "quit":
                return
            case "/help" | "/?":
                print_message(_COMMANDS_HELP, style="dim")
            case "/clear":
                conversation = list(opening)
                print_message("The conversation was cleared.", style="dim")
            case _:
                conversation.append({"role": "user", "content": question})
                pieces: list[str] = []
                try:
                    _ask(client, model, conversation, sampling, pieces)
                except KeyboardInterrupt:
                    print_line("")
                    print_message("Stopped; Ctrl-D ends the conversation.", style="dim")
                except LoramillError as error:  # the next question may succeed
                    print_message(error.message, style="red")
                    conversation.pop()
                    continue
                conversation.append({"role": "assistant", "content": "".join(pieces)})


def _is_interactive() -> bool:
    return sys.stdin.isatty()


def _read_question() -> str | None:
    """Returns the next line of input, or None at its end."""
    while True:
        try:
            return input("> ").strip()
        except EOFError:
            print_line("")
            return None
        except KeyboardInterrupt:
            print_line("")
            print_message("Ctrl-D or /bye ends the conversation.", style="dim")


def _ask(
    client: Client,
    model: str,
    conversation: list[dict[str, str]],
    sampling: dict[str, Any],
    pieces: list[str],
) -> None:
    """Prints the answer as it is generated, and appends each piece to `pieces`."""
    with closing(client.stream(model, conversation, **sampling)) as answer:
        for piece in answer:
            typer.echo(piece, nl=False)
            pieces.append(piece)
    print_line("")
