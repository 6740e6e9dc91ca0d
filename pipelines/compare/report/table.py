"""The comparison as text: two tables, since one would be too wide for a terminal, and what to know when reading."""

from __future__ import annotations

from collections.abc import Sequence

from loramill.pipelines.compare.format import duration, scaled, size
from loramill.pipelines.compare.types import Comparison, Serving

TRAINING = ("METHOD", "TRAINED", "SHARE", "PEAK MEMORY", "ABOVE BASE", "A STEP", "RATE", "VALID LOSS", "ARTIFACT")
RESULT = ("METHOD", "EXACT MATCH", "TOKEN F1", "ROUGE-L", "BASE'S TOKEN", "+ UNMERGED", "+ MERGED", "BY")


def training_rows(comparison: Comparison) -> list[tuple[str, ...]]:
    """What training took, under `TRAINING`."""
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
    """What came of it, under `RESULT`."""
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
    """A sentence a row without figures."""
    return [f"{row.title} failed: {row.error}" for row in comparison.rows if row.error]


def notes(comparison: Comparison) -> list[str]:
    """What the figures are of."""
    if comparison.device == "cuda":
        memory, clock = "bytes of tensors on the GPU", "the clock's"
    else:
        memory, clock = "resident bytes of the method's own process", "CPU seconds"
    said = [
        f"Memory: {memory}, at their most while training; and what of it came after the base was loaded.",
        f"Times: {clock}, medians, on {comparison.threads} thread{'s' if comparison.threads > 1 else ''}. "
        "A token is one of a single answer; + is what it takes more than the base's, measured side by side.",
    ]
    if any(row.serving and row.serving.backend == "transformers" for row in comparison.rows):
        said.append(
            "By transformers: what the engine doesn't serve, beside transformers' own forward pass of the base."
        )
    return said + [f"{row.title}: {note}" for row in comparison.rows for note in row.notes]


def _tokens(serving: Serving | None) -> Sequence[str]:
    if serving is None:
        return ("-", "-", "-", "-")
    added = (_added(seconds, serving.base) for seconds in (serving.unmerged, serving.merged))
    return (duration(serving.base), *added, serving.backend)


def _added(seconds: float | None, base: float) -> str:
    """What a token takes more; less than a percent is within the noise of the measurement."""
    if seconds is None:
        return "-"
    return f"{1000 * (seconds - base):+.2f} ms ({seconds / base - 1:+.0%})"
