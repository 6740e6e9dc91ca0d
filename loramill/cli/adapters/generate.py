"""`loramill generate`: run prompts on this machine, without a gateway."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from loramill.cli.adapters.completions import check_output, jsonl_writer, write_completions, write_text
from loramill.cli.format import make_console
from loramill.cli.model_options import description_of
from loramill.types.sampling import MaxTokens, Temperature, TopP


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
    max_tokens: Annotated[int, typer.Option(min=1, help=description_of(MaxTokens))] = 256,
    temperature: Annotated[float, typer.Option(min=0, max=2, help=description_of(Temperature))] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.001, max=1, help=description_of(TopP))] = 1.0,
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
    texts = _read_prompts(prompt, file)
    check_output(out, file, force)
    from loramill.local.model import check_gains, find_model
    from loramill.serve.offline import OfflineEngine, PromptFile, build_request
    from loramill.serve.protocol import TextRequest
    from loramill.serve.sampling_params import SamplingParams
    from loramill.settings import Settings

    settings = Settings.load()
    base, version, source = find_model(model, settings)
    if version is not None:
        check_gains(source(version), base)
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    defaults = TextRequest("", "", version, sampling_params=params, stop=tuple(stop or ()))
    prompts: list[TextRequest] | PromptFile
    if file is not None:
        prompts = PromptFile(file, defaults, chat=chat)
    else:
        numbered = ((replace(defaults, id=str(number)), text) for number, text in enumerate(texts, start=1))
        prompts = [build_request(text, each, chat=chat is not False) for each, text in numbered]
    with make_console(stderr=True).status(f"Loading {base.name}…"):
        engine = OfflineEngine(base, source, settings.serve, cache=settings.cache)
    bar = file is not None and (out is not None or not sys.stdout.isatty())
    with engine, jsonl_writer(out, force) if file or out else nullcontext(write_text) as write:
        failed = write_completions(engine.generate(prompts, ordered=True), len(prompts), write, bar=bar)
    if failed:
        raise typer.Exit(1)


def _read_prompts(prompts: list[str] | None, file: Path | None) -> list[str]:
    """Returns the prompts of the options, or of a pipe; none if there is a file."""
    texts = prompts or ([] if file or sys.stdin.isatty() else [sys.stdin.read().strip()])
    if (prompts and file) or not (file or any(texts)):
        raise typer.BadParameter("give prompts with --prompt or --file, or pipe one in.")
    return texts
