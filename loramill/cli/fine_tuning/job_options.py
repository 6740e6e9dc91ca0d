"""The options of `loramill submit` for the options of a job."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, get_origin

import typer

from loramill.cli.model_options import option_help, option_type, replace_keywords
from loramill.submission.options import JobOptions

#: The options of a job, by panel of the help.
PANELS: Mapping[str, tuple[str, ...]] = {
    "Method": (
        "method", "rank", "alpha", "rslora", "dropout", "targets", "layers", "rank_pattern", "alpha_pattern",
        "init_rank", "loraplus_lr_ratio", "quantization", "start_from", "base",
    ),
    "Objective": ("objective", "dpo_loss", "beta", "desirable_weight", "undesirable_weight"),
    "Training": (
        "epochs", "steps", "batch_size", "learning_rate", "schedule", "warmup_ratio", "weight_decay", "max_grad_norm",
        "max_length", "train_on", "packing", "eval_every", "patience", "keep", "checkpoint_every", "seed", "sweep",
    ),
    "Placement": (
        "priority", "executor", "gpus", "micro_tokens", "gradient_checkpointing", "offload", "metadata",
    ),
}  # fmt: skip
_SHORT_FLAGS = {"learning_rate": ("--lr",)}
#: Booleans whose default is neither yes nor no, so that they take a word instead of being a flag.
_CHOSEN_BOOLEANS = ("gradient_checkpointing",)
#: Options that may be given several times, and what the help calls their values.
_REPEATED = {"sweep": "NAME=VALUE,VALUE"}


def with_job_options(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command an option for each option of a job, in place of its `**options`."""
    names = ((name, panel) for panel, names in PANELS.items() for name in names)
    return replace_keywords(command, ((name, _option(name, panel)) for name, panel in names))


def job_option_help(name: str) -> str:
    """Returns the help of a job's option: its description, and the words that it may be."""
    text = option_help(JobOptions, name)
    return f"{text} Choices: yes, no." if name in _CHOSEN_BOOLEANS else text


def _option(name: str, panel: str) -> Any:
    flag = f"--{name.replace('_', '-')}"
    kind = Literal["yes", "no"] if name in _CHOSEN_BOOLEANS else option_type(JobOptions, name)
    if name in _REPEATED:
        kind = list[str]
    option = typer.Option(
        f"{flag}/--no-{name.replace('_', '-')}" if kind is bool else flag,
        *_SHORT_FLAGS.get(name, ()),
        help=job_option_help(name),
        metavar="WORD" if get_origin(kind) is Literal else _REPEATED.get(name),
        rich_help_panel=panel,
    )
    return Annotated[kind | None, option]
