"""What is asked of a comparison and what it says, as it crosses between its processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

from pydantic import Field

from loramill.pipelines.nightly.scoring import Score
from loramill.types import FrozenModel

Tuning = Literal["full", "lora", "qlora", "dora", "adalora", "prefix", "bottleneck"]
TUNINGS: tuple[Tuning, ...] = get_args(Tuning)
#: What a row is about: a way to tune, or the base as it is, for reference.
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

#: Learning rates of those that `recipe` doesn't know, and of full fine-tuning, whose best is about a tenth of LoRA's.
LEARNING_RATES: dict[Subject, float] = {"full": 1e-4, "prefix": 1e-2, "bottleneck": 1e-3}


class Task(FrozenModel):
    """One row's work: everything its process needs to know."""

    subject: Subject
    base: str = Field(description="built-in name, folder or hub id")
    cache: Path
    train: Path
    valid: Path
    test: Path
    folder: Path = Field(description="of this task alone; what is left there may be deleted afterwards")
    steps: int | None = Field(default=None, ge=1, description="None: as many as of a job")
    batch_size: int | None = Field(default=None, ge=1)
    rank: int | None = Field(default=None, ge=1, le=256, description="None: as of a job")
    learning_rate: float | None = Field(default=None, gt=0, description="None: the method's default")
    seed: int = 0
    device: Literal["cpu", "cuda"] = "cpu"
    threads: int = Field(default=1, ge=1)
    serving: bool = Field(default=True, description="whether to measure what serving a token takes")


class MemoryUse(FrozenModel):
    """Bytes of the process on a CPU, and of its tensors on a GPU, at their most."""

    base: int = Field(description="with the base loaded, before anything else")
    peak: int = Field(description="while training")

    @property
    def added(self) -> int:
        """What training took on top of the base."""
        return self.peak - self.base


class Serving(FrozenModel):
    """Seconds a token of one answer, medians of rounds side by side: CPU time, or the clock's on a GPU."""

    backend: Literal["engine", "transformers"]
    base: float
    unmerged: float | None = Field(default=None, description="None: there is nothing beside the base's own weights")
    merged: float | None = Field(default=None, description="None: it can't be merged")


class Training(FrozenModel):
    """What training one subject took, and came to."""

    parameters: int = Field(description="that were trained")
    base_parameters: int = Field(description="parameters of the base")
    learning_rate: float
    steps: int
    batch_size: int
    memory: MemoryUse
    step_seconds: float = Field(description="median; CPU time, or the clock's on a GPU")
    valid_loss: float | None
    artifact_bytes: int


class ComparisonRow(FrozenModel):
    """What became of one task."""

    subject: Subject
    training: Training | None = Field(default=None, description="None: the base, or there was an error")
    quality: Score | None = None
    serving: Serving | None = None
    notes: tuple[str, ...] = Field(default=(), description="what to know when comparing, a sentence each")
    error: str | None = Field(default=None, description="why there are no figures")
    log: str = Field(default="", description="the end of what the failed process wrote")

    @property
    def title(self) -> str:
        """What to call it."""
        return TITLES[self.subject]


class TaskProgress(FrozenModel):
    """How far a task is."""

    name: str
    done: int = 0
    total: int | None = None


Report = Callable[[TaskProgress], None]


class Comparison(FrozenModel):
    """All rows, and what they have in common."""

    base: str
    device: str
    threads: int
    seed: int
    train: str
    test: str
    rows: tuple[ComparisonRow, ...]

    @property
    def metric(self) -> Literal["exact_match", "rouge_l"]:
        """What tells the subjects apart: exact match, unless hardly any answer is, as with free text."""
        best = max((row.quality.exact_match for row in self.rows if row.quality), default=0.0)
        return "exact_match" if best >= 0.1 else "rouge_l"
