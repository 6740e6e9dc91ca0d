"""Command-line options for the options of a job; the help texts are the descriptions of `JobOptions`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from loramill.submission.options import JobOptions

#: The options of a job, by panel of the help.
PANELS: Mapping[str, tuple[str, ...]] = {
    "Method": (
        "method", "rank", "alpha", "rslora", "dropout", "targets", "layers", "rank_pattern", "alpha_pattern",
        "init_rank", "loraplus_lr_ratio", "quantization", "start_from", "base",
    ),
    "Training": (
        "epochs", "steps", "batch_size", "learning_rate", "schedule", "warmup_ratio", "weight_decay", "max_grad_norm",
        "max_length", "train_on", "packing", "eval_every", "patience", "keep", "checkpoint_every", "seed",
    ),
    "Placement": (
        "priority", "executor", "gpus", "micro_tokens", "gradient_checkpointing", "offload", "metadata",
    ),
}  # fmt: skip
_SHORT_FLAGS = {"learning_rate": ("--lr",)}
#: Booleans whose default is neither yes nor no, so that they take a word instead of being a flag.
_CHOSEN_BOOLEANS = ("gradient_checkpointing",)


def with_job_options(command: Callable[..., None]) -> Callable[..., None]:
    """The command with an option for each option of a job, in place of its `**options`."""
    signature = inspect.signature(command, eval_str=True)
    fixed = [each for each in signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
    options = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[_option_type(name) | None, _option(name, panel)],
        )
        for panel, names in PANELS.items()
        for name in names
    ]
    command.__signature__ = signature.replace(parameters=[*fixed, *options])  # type: ignore[attr-defined]
    return command


def option_help(name: str) -> str:
    """The help of a job's option: its description, and the words that it may be."""
    kind = _option_type(name)
    choices = f" Choices: {', '.join(get_args(kind))}." if get_origin(kind) is Literal else ""
    return f"{JobOptions.model_fields[name].description}{choices}"


def _option(name: str, panel: str) -> Any:
    flag, kind = f"--{name.replace('_', '-')}", _option_type(name)
    if kind is bool:
        flag = f"{flag}/--no-{name.replace('_', '-')}"
    return typer.Option(
        flag,
        *_SHORT_FLAGS.get(name, ()),
        help=option_help(name),
        metavar="WORD" if get_origin(kind) is Literal else None,
        rich_help_panel=panel,
    )


def _option_type(name: str) -> Any:
    """The type of an option: its field's, or text where the value is more than one word or number."""
    if name in _CHOSEN_BOOLEANS:
        return Literal["yes", "no"]
    annotation = JobOptions.model_fields[name].annotation
    choices: list[str] = []
    for kind in get_args(annotation) or (annotation,):
        if kind in (int, float, bool):
            return kind
        if get_origin(kind) is Literal:
            choices += get_args(kind)
        elif kind is not NoneType:
            return str
    return Literal[tuple(choices)]
