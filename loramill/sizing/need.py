"""The bytes that a job needs at its peak, item by item.

What is counted are the tensors that are alive then: those that a forward pass keeps for its backward pass, as
transformers' layers and `jobs.methods.layers` make them, and beside them the largest that come and go. h, i, q and kv
are the widths of a layer, T the tokens of a pass, r a rank, b the bytes of the base's dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from loramill.sizing.anatomy import Anatomy
from loramill.sizing.places import Tuning, tuning
from loramill.types import JobSpec, Quantization

Device = Literal["cpu", "cuda"]

#: Bytes of a weight in NF4: 4 bits, a scale in 8 bits for 64 weights, and one in 32 bits for 256 scales
#: (Dettmers et al. 2023, QLoRA, section 3, double quantization).
NF4_BYTES = 4 / 8 + 1 / 64 + 4 / (64 * 256)

#: Up to this many tokens, training on a CPU attends by plain matrix products.
EAGER_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Row:
    """The largest forward pass of a step.

    Attributes:
        tokens: of all its examples, padding included.
        width: of these, how many attend to one another.
        learnt: how many have a loss and so need logits.
        step: tokens of all examples of a step.
        eager: whether a CPU attends by plain matrix products and so keeps the scores.
    """

    tokens: int
    width: int
    learnt: int
    step: int
    eager: bool


@dataclass(frozen=True, slots=True)
class Item:
    """A part of what a job needs."""

    name: str
    bytes: int
    what: str


@dataclass(frozen=True, slots=True)
class Need:
    """What a job needs at its peak; `host` is what DeepSpeed moves out of the GPU's memory."""

    items: tuple[Item, ...]
    host: int = 0

    @property
    def bytes(self) -> int:
        """All of it."""
        return sum(item.bytes for item in self.items)

    @property
    def tensors(self) -> int:
        """Without the framework's floor: on a GPU, what torch.cuda.max_memory_allocated tells."""
        return sum(item.bytes for item in self.items if item.name != "framework")


def row_of(spec: JobSpec, lengths: Sequence[int], learnt: float = 1.0) -> Row:
    """The largest row that a step may have.

    Args:
        spec: its micro_tokens, batch_size, packing and max_length count.
        lengths: tokens of the examples; nothing is longer than max_length.
        learnt: the largest share of a row's tokens that have a loss.
    """
    cut = sorted((min(length, spec.max_length) for length in lengths), reverse=True) or [spec.max_length]
    longest, shortest = cut[0], cut[-1]
    step = sum(cut[place % len(cut)] for place in range(spec.batch_size))
    # A packed row is closed once it has its tokens, so the last example may stand out by all but one.
    tokens = spec.micro_tokens + longest - 1 if spec.packing else max(spec.micro_tokens, longest)
    if longest == shortest:
        tokens -= tokens % longest
    tokens = max(longest, min(tokens, step if spec.packing else longest * spec.batch_size))
    return Row(
        tokens=tokens,
        width=tokens if spec.packing else longest,
        learnt=max(1, min(tokens, round(tokens * learnt))),
        step=step,
        eager=longest + spec.micro_tokens <= EAGER_TOKENS,
    )


def need(
    spec: JobSpec,
    base: Anatomy,
    quantization: Quantization,
    row: Row,
    device: Device,
    dtype_bytes: int = 2,
    tuned: Tuning | None = None,
) -> Need:
    """What a job of any method but "full" needs on its device.

    Args:
        tuned: `tuning(spec, base)`, where it is known already.

    Raises:
        InvalidRequest: a target, layer or pattern matches nothing.
    """
    tuned = tuned or tuning(spec, base)
    logits = logits_of(base, row)
    return composed(
        device,
        [
            Item("base", base_bytes(base, quantization, device, dtype_bytes), f"{base.parameters / 1e9:.3g}B weights"),
            Item("adapter", 4 * (tuned.weights + tuned.fixed), f"{tuned.weights:,} weights in fp32"),
            Item("optimizer", (8 + 4 * tuned.state) * tuned.weights, "two moments of AdamW in fp32"),
        ],
        [
            Item("gradients", 4 * tuned.gradients, "in fp32"),
            activations(spec, base, tuned, row, device, logits, dtype_bytes),
            logits,
            Item("scratch", _scratch(base, quantization, device), "weights that are dequantised for a product"),
        ],
        written=(12 + 4 * tuned.state) * tuned.weights,
    )


def composed(device: Device, kept: Sequence[Item], passing: Sequence[Item], written: int) -> Need:
    """What is kept all the time, and what a pass or the writing of a checkpoint of `written` bytes needs besides."""
    # safetensors makes bytes of each tensor, and then one of them all.
    writing = 2 * written - sum(item.bytes for item in passing) if device == "cpu" else 0
    items = [framework(device), *kept, *passing, Item("checkpoint", max(0, writing), "while it is written")]
    return Need(tuple(item for item in items if item.bytes))


def framework(device: Device) -> Item:
    """What is there before any tensor."""
    if device == "cpu":
        return Item("framework", 600 * 2**20, "the process with its libraries")
    return Item("framework", 700 * 2**20, "the CUDA context and its libraries")


def base_bytes(base: Anatomy, quantization: Quantization, device: Device, dtype_bytes: int = 2) -> int:
    """The base's weights as training keeps them: NF4 packed on a GPU, all else as dense values."""
    weights = sum(linear.weights for linear in base.linears)
    each = NF4_BYTES if quantization == "nf4" and device == "cuda" else dtype_bytes
    return round(weights * each + (base.embedding + base.rest) * dtype_bytes)


def logits_of(base: Anatomy, row: Row) -> Item:
    """The logits' logarithms and two gradients, in fp32."""
    return Item("logits", 12 * row.learnt * base.vocabulary, f"of {row.learnt:,} learnt tokens")


def activations(
    spec: JobSpec, base: Anatomy, tuned: Tuning, row: Row, device: Device, logits: Item, dtype_bytes: int = 2
) -> Item:
    """What the layers keep for the backward pass; recomputed, what enters each, and what one keeps.

    What comes and goes in a layer's backward pass does so when the logits are gone: only what exceeds these counts.
    """
    b, layers = dtype_bytes, base.layers - tuned.first
    copies = b if b < 4 or tuned.fixed else 0
    passing = _passing(base, row, device, b)
    if spec.gradient_checkpointing:
        total = row.tokens * base.hidden * b * layers
        passing += row.tokens * (_layer(base, row, device, b, bool(tuned.attended)) + b * tuned.most_kept)
        passing += copies * tuned.most_copied
    else:
        own = sum(
            count * _layer(base, row, device, b, attended)
            for count, attended in ((tuned.attended, True), (layers - tuned.attended, False))
        )
        total = row.tokens * (own + b * tuned.kept) + copies * tuned.copied
    how = ", recomputed" if spec.gradient_checkpointing else ""
    return Item(
        "activations",
        total + max(0, passing - logits.bytes),
        f"of {row.tokens:,} tokens in {layers} layers{how}",
    )


def _layer(base: Anatomy, row: Row, device: Device, b: int, attended: bool) -> int:
    """Bytes a token that a layer keeps of its own: two norms in fp32, attention, and the gated MLP.

    Attention's output is kept by a fused kernel, and where it enters an adapted linear.
    """
    q = base.heads * base.head_dim
    scores = _scores(row, device, b)
    attention = (3 + (attended or not _eager(row, device))) * b * q + base.heads * scores
    return 8 * base.hidden + attention + 3 * b * base.intermediate


def _eager(row: Row, device: Device) -> bool:
    return device == "cpu" and row.eager


def _scores(row: Row, device: Device, b: int) -> int:
    """Bytes a token and head that attention keeps: the scores in fp32 and b, or by a fused kernel output and sum."""
    return row.width * (4 + b * (b < 4)) if _eager(row, device) else 4


def _passing(base: Anatomy, row: Row, device: Device, b: int) -> int:
    """What comes and goes in the backward pass of a layer: gradients of its widest part."""
    scores = base.heads * row.width * 10 if _eager(row, device) else 0
    return row.tokens * max(4 * b * base.intermediate, scores)


def _scratch(base: Anatomy, quantization: Quantization, device: Device) -> int:
    if quantization != "nf4" or device == "cpu":
        return 0
    return 2 * max(linear.weights for linear in base.linears)
