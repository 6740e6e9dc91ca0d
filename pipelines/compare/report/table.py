"""The comparison as text: two tables, since one would be too wide for a terminal, and notes on them."""

from __future__ import annotations

from collections.abc import Sequence

from loramill.pipelines.compare.format import duration, scaled, size
from loramill.pipelines.compare.types import Comparison, Serving

TRAINING = ("METHOD", "TRAINED", "SHARE", "PEAK MEMORY", "ABOVE BASE", "STEP TIME", "RATE", "VALID LOSS", "ARTIFACT")
RESULT = ("METHOD", "EXACT MATCH", "TOKEN F1", "ROUGE-L", "BASE TOKEN", "+ UNMERGED", "+ MERGED", "BY")


def training_rows(comparison: Comparison) -> list[tuple[str, ...]]:
    """The rows of the training table; `TRAINING` is its header."""
    return [
        (
            row.title,
            scaled(training.parameters),
            f"{training.parameters / training.base_parameters:.2%}",
            size(training.memory.peak),
            size(training.memory.added),
            duration(training.step_seconds),
            f"{training.learning_rate:.2g}",
            "-" if training.valid_loss is None else f"{training.valid_loss:.3f}",
            size(training.artifact_bytes),
        )
        for row in comparison.rows
        if (training := row.training)
    ]


def result_rows(comparison: Comparison) -> list[tuple[str, ...]]:
    """The rows of the result table; `RESULT` is its header."""
    return [
        (
            row.title,
            f"{quality.exact_match:.3f}",
            f"{quality.token_f1:.3f}",
            f"{quality.rouge_l:.3f}",
            *_tokens(row.serving),
        )
        for row in comparison.rows
        if (quality := row.quality)
    ]


def failures(comparison: Comparison) -> list[str]:
    """One sentence per row that failed."""
    return [f"{row.title} failed: {row.error}" for row in comparison.rows if row.error]


def notes(comparison: Comparison) -> list[str]:
    """Notes on how the numbers were measured, and on single rows."""
    if comparison.device == "cuda":
        memory, clock = "bytes of tensors on the GPU", "wall time"
    else:
        memory, clock = "resident bytes of the method's process", "CPU time"
    texts = [
        f"Memory: peak {memory} during training; ABOVE BASE is the part that was added to the loaded base.",
        f"Times: median {clock} on {comparison.threads} thread{'s' if comparison.threads > 1 else ''}. Token times are "
        "those of a single answer; + is the time in addition to the base's, measured in alternation.",
    ]
    if any(row.serving and row.serving.backend == "transformers" for row in comparison.rows):
        texts.append(
            "BY transformers: the engine does not serve the method; its base token is one of transformers, too."
        )
    return texts + [f"{row.title}: {note}" for row in comparison.rows for note in row.notes]


def _tokens(serving: Serving | None) -> Sequence[str]:
    if serving is None:
        return ("-", "-", "-", "-")
    added = (_added(seconds, serving.base) for seconds in (serving.unmerged, serving.merged))
    return (duration(serving.base), *added, serving.backend)


def _added(seconds: float | None, base: float) -> str:
    """The additional time per token; less than one percent is noise."""
    if seconds is None:
        return "-"
    return f"{1000 * (seconds - base):+.2f} ms ({seconds / base - 1:+.0%})"
