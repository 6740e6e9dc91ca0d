"""The options of a job, as Python, the command line, and a line of a file of jobs give them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Literal, TypedDict, cast

from pydantic import ConfigDict, Field, ValidationError

from loramill.errors import InvalidRequest
from loramill.submission.request import LoramillOptions, spec_field
from loramill.submission.sweep import check_sweep, sweep_from_text
from loramill.types import Executor, Quantization, Schedule

if TYPE_CHECKING:
    from loramill.data.ingest import Columns


class JobOptions(LoramillOptions):
    """All options of a job besides its adapter and data; the gateway chooses what is None."""

    # A command line gives numbers as text.
    model_config = ConfigDict(strict=False)
    base: str | None = Field(default=None, description="Name of the base to fine-tune. Default: the gateway's.")
    epochs: int | None = Field(
        default=None, description="Passes over the training file. Default: 3, or the number that gives 30 to 300 steps."
    )
    batch_size: int | None = spec_field("batch_size", "8, or fewer for few examples")
    seed: int | None = spec_field("seed")
    metadata: dict[str, str] | None = Field(
        default=None, description="Up to 16 NAME=VALUE pairs that are stored with the job."
    )

    def to_request(self) -> dict[str, Any]:
        """The body of a request to the gateway: OpenAI's fields where there are any, the others under `loramill`."""
        hyperparameters = {"n_epochs": self.epochs, "batch_size": self.batch_size}
        kind = "supervised" if self.objective in (None, "sft") else "dpo"
        own = self.model_dump(include=set(LoramillOptions.model_fields), exclude_unset=True, exclude_none=True)
        request = {
            "model": self.base,
            "seed": self.seed,
            "metadata": self.metadata,
            "method": {"type": kind, kind: {"hyperparameters": drop_none(hyperparameters)}},
            "loramill": own,
        }
        return drop_none(request)


class JobOptionsDict(TypedDict, total=False):
    """The keywords of `Client.submit`: the fields of `Options`, for readers and type checkers."""

    base: str | None
    epochs: int | None
    batch_size: int | None
    seed: int | None
    metadata: Mapping[str, str] | None
    method: Literal["lora", "dora", "adalora", "pissa", "loftq", "full", "rslora", "qlora", "lora+"] | None
    quantization: Quantization | None
    rank: int | None
    alpha: float | None
    rslora: bool | None
    dropout: float | None
    targets: Sequence[str] | str | None
    layers: Sequence[int] | str | None
    rank_pattern: Mapping[str, int] | None
    alpha_pattern: Mapping[str, float] | None
    init_rank: int | None
    loraplus_lr_ratio: float | None
    objective: Literal["sft", "dpo", "orpo", "kto"] | None
    dpo_loss: Literal["sigmoid", "ipo"] | None
    beta: float | None
    desirable_weight: float | None
    undesirable_weight: float | None
    train_on: Literal["last", "all"] | None
    learning_rate: float | None
    schedule: Schedule | None
    steps: int | None
    warmup_ratio: float | None
    weight_decay: float | None
    max_grad_norm: float | None
    max_length: int | None
    packing: bool | None
    micro_tokens: int | None
    gradient_checkpointing: bool | None
    offload: Literal["none", "optimizer", "all"] | None
    gpus: int | None
    checkpoint_every: int | None
    eval_every: int | None
    patience: int | None
    keep: Literal["best", "last"] | None
    sweep: Mapping[str, list[Any]] | None
    start_from: str | None
    priority: int | None
    executor: Executor | None


#: Options written as NAME=VALUE,… where only text can be given, and options that are lists.
PAIRS = ("rank_pattern", "alpha_pattern", "metadata", "columns", "valid_columns")
LISTS = ("targets",)


def read_options(options: Mapping[str, object]) -> JobOptions:
    """Checks the names and types of options; the gateway, which knows the base, checks ranges.

    Raises:
        InvalidRequest: options are unknown, or of another type; the message has a line for each.
    """
    try:
        read = JobOptions.model_validate({name: parsed(name, value) for name, value in drop_none(options).items()})
        return read if read.sweep is None else read.model_copy(update={"sweep": _read_sweep(read.sweep)})
    except ValidationError as error:
        raise InvalidRequest("\n".join(dict.fromkeys(map(_problem, error.errors())))) from error


def _read_sweep(sweep: Mapping[str, Sequence[object]]) -> dict[str, list[Any]]:
    """The values of a sweep, each of the type of its option.

    Raises:
        InvalidRequest: as `check_sweep`.
        ValidationError: a value is of another type.
    """
    check_sweep(sweep)

    def read(name: str, value: object) -> Any:
        value = from_text(name, value) if isinstance(value, str) else value
        return getattr(JobOptions.model_validate({name: value}), name)

    return {name: [read(name, value) for value in values] for name, values in sweep.items()}


def from_text(name: str, text: str) -> object:
    """The value of a table's cell or of an option on the command line; types are checked later.

    Raises:
        InvalidRequest: it is not NAME=VALUE pairs, or in a sweep NAME=VALUE,VALUE, where these are required.
    """
    if name == "sweep":
        return sweep_from_text(text)
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if name in LISTS:
        return parts
    if name not in PAIRS:
        return text
    if name in ("columns", "valid_columns") and parts == ["auto"]:
        return "auto"
    pairs = dict(part.split("=", 1) for part in parts if "=" in part)
    if len(pairs) != len(parts):
        raise InvalidRequest(f"{name} is '{text}'; write it as NAME=VALUE,NAME=VALUE.")
    return pairs


def parsed(name: str, value: object) -> object:
    """The value of an option; pairs may be given as text.

    Raises:
        InvalidRequest: as `from_text`.
    """
    return from_text(name, value) if name in (*PAIRS, "sweep") and isinstance(value, str) else value


def columns_of(name: str, text: str | None) -> Columns:
    """The columns of a command-line option.

    Args:
        name: of the option.
        text: its value.

    Raises:
        InvalidRequest: it is neither pairs nor "auto".
    """
    return None if text is None else cast("Columns", from_text(name, text))


def drop_none(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that are not None."""
    return {name: value for name, value in fields.items() if value is not None}


def _problem(error: Mapping[str, Any]) -> str:
    name = str(error["loc"][0])
    if error["type"] == "extra_forbidden":
        near = get_close_matches(name, JobOptions.model_fields, n=1)
        return f"there is no option '{name}'" + (f"; did you mean '{near[0]}'?" if near else ".")
    return f"{name}: {error['msg']}."
