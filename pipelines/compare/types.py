"""Tasks and results of a comparison, as its processes exchange them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

from pydantic import Field

from loramill.pipelines.nightly.text_metrics import Score
from loramill.types import FrozenModel

Tuning = Literal["full", "lora", "qlora", "dora", "adalora", "prefix", "bottleneck"]
TUNINGS: tuple[Tuning, ...] = get_args(Tuning)
#: What a row measures: a method, or the base itself for reference.
Subject = Literal["base"] | Tuning

TITLES: dict[Subject, str] = {
    "base": "Base, untuned",
    "full": "Full fine-tuning",
    "lora": "LoRA",
    "qlora": "QLoRA",
    "dora": "DoRA",
    "adalora": "AdaLoRA",
    "prefix": "Prefix tuning",
    "bottleneck": "Bottleneck adapters",
}

#: Learning rates of the methods without a default in jobs, and of full fine-tuning, whose best is a tenth of LoRA's.
LEARNING_RATES: dict[Subject, float] = {"full": 1e-4, "prefix": 1e-2, "bottleneck": 1e-3}


class Task(FrozenModel):
    """The work for one row."""

    subject: Subject
    base: str = Field(description="built-in name, folder or hub id")
    cache: Path
    train: Path
    valid: Path
    test: Path
    folder: Path = Field(description="a folder of the task's own, which is removed afterwards")
    steps: int | None = Field(default=None, ge=1, description="default: as in a job")
    batch_size: int | None = Field(default=None, ge=1)
    rank: int | None = Field(default=None, ge=1, le=256, description="default: as in a job")
    learning_rate: float | None = Field(default=None, gt=0, description="default: the method's")
    seed: int = 0
    device: Literal["cpu", "cuda"] = "cpu"
    threads: int = Field(default=1, ge=1)
    serving: bool = Field(default=True, description="whether to measure the time per token in serving")


class ComparisonOptions(FrozenModel):
    """What is compared, on which data, and with which hyperparameters; those of None are as in a job.

    Attributes:
        methods: names of `TUNINGS`, in order.
        rates: learning rates, as "lora=5e-4".
        train, valid, test: JSONL files of examples to train on, to choose the best weights by, and to score.
    """

    methods: tuple[str, ...]
    train: Path
    valid: Path
    test: Path
    base: str = Field(description="built-in name, folder or hub id")
    rates: tuple[str, ...] = ()
    steps: int | None = None
    batch_size: int | None = None
    rank: int | None = None
    seed: int = 0


class MemoryUse(FrozenModel):
    """Peak memory in bytes: of the process on a CPU, of its tensors on a GPU."""

    base: int = Field(description="with the base alone loaded")
    peak: int = Field(description="while training")

    @property
    def added(self) -> int:
        """Bytes that training needed in addition to the base."""
        return self.peak - self.base


class Serving(FrozenModel):
    """Seconds per token of one answer, medians of alternating rounds: CPU time, or wall time on a GPU."""

    backend: Literal["engine", "transformers"]
    base: float
    unmerged: float | None = Field(default=None, description="None: there is no adapter")
    merged: float | None = Field(default=None, description="None: the method cannot be merged")


class Training(FrozenModel):
    """Cost and result of training one subject."""

    parameters: int = Field(description="number of trained parameters")
    base_parameters: int = Field(description="number of parameters of the base")
    learning_rate: float
    steps: int
    batch_size: int
    memory: MemoryUse
    step_seconds: float = Field(description="median seconds per step: CPU time, or wall time on a GPU")
    valid_loss: float | None
    artifact_bytes: int


class ComparisonRow(FrozenModel):
    """The result of one task."""

    subject: Subject
    training: Training | None = Field(default=None, description="None for the base, or if there was an error")
    quality: Score | None = None
    serving: Serving | None = None
    notes: tuple[str, ...] = Field(default=(), description="remarks on the comparison, one sentence each")
    error: str | None = Field(default=None, description="why the task failed")
    log: str = Field(default="", description="the end of the failed process's output")

    @property
    def title(self) -> str:
        """The subject's name in tables."""
        return TITLES[self.subject]


class TaskProgress(FrozenModel):
    """The progress of a task."""

    name: str
    done: int = 0
    total: int | None = None


Report = Callable[[TaskProgress], None]


class Comparison(FrozenModel):
    """All rows, and the settings that they share."""

    base: str
    device: str
    threads: int
    seed: int
    train: str
    test: str
    rows: tuple[ComparisonRow, ...]

    @property
    def metric(self) -> Literal["exact_match", "rouge_l"]:
        """The metric that separates the subjects: exact match, unless hardly any answer matches, as with free text."""
        best = max((row.quality.exact_match for row in self.rows if row.quality), default=0.0)
        return "exact_match" if best >= 0.1 else "rouge_l"
