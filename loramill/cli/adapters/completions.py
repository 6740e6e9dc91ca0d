"""Writes the answers of `loramill generate`: to stdout as text, or as JSONL to stdout or a file."""

from __future__ import annotations

import errno
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from loramill.cli.format import make_console, print_line, print_message
from loramill.errors import DiskFull, InvalidRequest

Completion = Any  # loramill.serve.offline's; the CLI imports higher layers only inside functions


def check_output(out: Path | None, prompts: Path | None, force: bool) -> None:
    """Checks the output file before any answer is generated.

    Raises:
        InvalidRequest: it can't be written, is the file of prompts, or exists without `force`.
    """
    if out is None:
        return
    if not out.parent.is_dir() or out.is_dir():
        raise InvalidRequest(f"{out} can't be written: name a file in an existing folder.")
    if out.exists() and prompts is not None and out.samefile(prompts):
        raise InvalidRequest(f"{out} is the file of prompts; write the answers to another file.")
    if out.exists() and not force:
        raise InvalidRequest(f"{out} exists; name another file, or overwrite it with --force.")


def write_completions(
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


def write_text(completion: Completion) -> None:
    """Prints the text of an answer."""
    if completion.error is None:
        print_line(completion.text)


@contextmanager
def jsonl_writer(out: Path | None, force: bool) -> Iterator[Callable[[Completion], None]]:
    """Yields a function that writes an answer as a line of JSON to the file, or to stdout if there is none."""
    if out is None:
        yield lambda completion: print_line(_json_line(completion))
        return
    with out.open("wb" if force else "xb", buffering=0) as file:
        yield lambda completion: append_line(file, _json_line(completion).encode() + b"\n")


def append_line(file: FileIO, line: bytes) -> None:
    """Appends a line with one write, so that a killed run or a full disk leaves complete lines.

    Raises:
        DiskFull: the disk is full; the line was removed.
    """
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
