"""`loramill generate`: run prompts on this machine, without a gateway."""

from __future__ import annotations

import errno
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from io import FileIO
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from loramill.cli.format import make_console, print_line, print_message

Completion = Any  # loramill.serve.offline's; the CLI imports higher layers only inside functions


def generate(
    model: Annotated[
        str,
        typer.Argument(
            help="Base model, TENANT/ADAPTER, TENANT/ADAPTER@VERSION, or a PEFT folder.", show_default=False
        ),
    ],
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="Prompt (repeatable).")] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            exists=True,
            dir_okay=False,
            help='File of prompts: JSONL of {"prompt": …} or {"messages": […]}, or .txt with one prompt per line.',
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the answers to this file as JSONL, not to stdout.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing --out file.")] = False,
    max_tokens: Annotated[int, typer.Option(min=1, help="Maximum number of tokens per answer.")] = 256,
    temperature: Annotated[
        float, typer.Option(min=0, max=2, help="Sampling temperature; 0 always chooses the most probable token.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(min=0.001, max=1, help="Sample from the most likely tokens with this total probability.")
    ] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Random seed; the same seed gives the same answers.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends an answer (repeatable).")] = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--raw",
            help="Treat prompts as user messages, or as text to continue. Default: --chat, except for JSONL files.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Run prompts with the engine in this process, without a gateway or Ray.

    Prompts come from --prompt, --file, or a pipe (one prompt). Answers are printed in the order of the prompts: as
    text, or with --file or --out as JSONL. Fields of a line in the file override the options. Exits with 1 if a prompt
    failed.
    """
    texts = prompt or ([] if file or sys.stdin.isatty() else [sys.stdin.read().strip()])
    if (prompt and file) or not (file or any(texts)):
        raise typer.BadParameter("give prompts with --prompt or --file, or pipe one in.")
    _check_output(out, file, force)
    from loramill.local.model import find_model
    from loramill.serve.offline import OfflineEngine, PromptFile, build_request
    from loramill.serve.protocol import TextRequest
    from loramill.serve.sampling_params import SamplingParams
    from loramill.settings import Settings

    settings = Settings.load()
    base, version, source = find_model(model, settings)
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    like = TextRequest("", "", version, sampling_params=params, stop=tuple(stop or ()))
    prompts: list[TextRequest] | PromptFile
    if file is not None:
        prompts = PromptFile(file, like, chat=chat)
    else:
        numbered = ((replace(like, id=str(number)), text) for number, text in enumerate(texts, start=1))
        prompts = [build_request(text, each, chat=chat is not False) for each, text in numbered]
    with make_console(stderr=True).status(f"Loading {base.name}…"):
        engine = OfflineEngine(base, source, settings.serve)
    with engine, ExitStack() as stack:
        write = stack.enter_context(_jsonl_writer(out, force)) if file or out else _write_text
        bar = file is not None and (out is not None or not sys.stdout.isatty())
        failed = _write_completions(engine.generate(prompts, ordered=True), len(prompts), write, bar=bar)
    if failed:
        raise typer.Exit(1)


def _write_completions(
    completions: Iterable[Completion], total: int, write: Callable[[Completion], None], *, bar: bool
) -> int:
    """Writes the answers with a progress bar; returns the number of failed prompts."""
    columns = (
        TextColumn("prompts answered"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]:.0f} tokens/s"),
        TimeRemainingColumn(),
    )
    failed: list[Completion] = []
    tokens, start = 0, time.monotonic()
    # Rich would redirect stdout to the terminal, too.
    with Progress(*columns, console=make_console(stderr=True), disable=not bar, redirect_stdout=False) as progress:
        task = progress.add_task("", total=total, speed=0.0)
        for completion in completions:
            write(completion)
            tokens += completion.completion_tokens
            progress.update(task, advance=1, speed=tokens / (time.monotonic() - start))
            if completion.error is not None:
                failed.append(completion)
    if failed:
        print_message(_describe_failures(failed, total), style="red")
    return len(failed)


def _describe_failures(failed: Sequence[Completion], total: int) -> str:
    first = failed[0]
    reason = "" if first.error is None else first.error.message
    if total == 1:
        return f"The prompt failed: {reason}"
    return f"{len(failed)} of {total} prompts failed; the first of them is prompt {first.request.id}: {reason}"


def _write_text(completion: Completion) -> None:
    if completion.error is None:
        print_line(completion.text)


def _check_output(out: Path | None, file: Path | None, force: bool) -> None:
    """Checks the output file before any answer is generated."""
    from loramill.errors import InvalidRequest

    if out is None:
        return
    if not out.parent.is_dir() or out.is_dir():
        raise InvalidRequest(f"{out} can't be written: name a file in an existing folder.")
    if out.exists() and file is not None and out.samefile(file):
        raise InvalidRequest(f"{out} is the file of prompts; write the answers to another file.")
    if out.exists() and not force:
        raise InvalidRequest(f"{out} exists; name another file, or overwrite it with --force.")


@contextmanager
def _jsonl_writer(out: Path | None, force: bool) -> Iterator[Callable[[Completion], None]]:
    """Writes answers as JSONL."""
    if out is None:
        yield lambda completion: print_line(_json_line(completion))
        return
    with out.open("wb" if force else "xb", buffering=0) as file:
        yield lambda completion: _append(file, _json_line(completion).encode() + b"\n")


def _append(file: FileIO, line: bytes) -> None:
    """Appends a line with one write, so that a killed run or a full disk leaves complete lines."""
    from loramill.errors import DiskFull

    start = file.tell()
    try:
        written = file.write(line)
        if written < len(line):
            file.write(line[written:])  # raises that the disk is full
    except OSError as error:
        file.truncate(start)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DiskFull(f"The disk of {file.name} is full; the answers in it are complete lines.") from error


def _json_line(completion: Completion) -> str:
    row: dict[str, Any] = {"id": completion.request.id}
    if completion.error is not None:
        row["error"] = {"code": completion.error.code, "message": completion.error.message}
    else:
        row["text"] = completion.text
        row["finish_reason"] = completion.finish
    row["usage"] = {
        "prompt_tokens": completion.prompt_tokens,
        "completion_tokens": completion.completion_tokens,
    }
    return json.dumps(row, ensure_ascii=False)
