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
from loramill.sizing.targets import Tuning, tuning
from loramill.types import JobSpec, Quantization

Device = Literal["cpu", "cuda"]

#: Bytes of a weight in NF4: 4 bits, a scale in 8 bits for 64 weights, and one in 32 bits for 256 scales
#: (Dettmers et al. 2023, QLoRA, section 3, double quantization).
NF4_BYTES = 4 / 8 + 1 / 64 + 4 / (64 * 256)

#: What a process with torch and transformers takes before it has a tensor, and after its first step.
_PROCESS = 580 * 10**6
#: The CUDA context with its libraries, and cuBLAS's workspace, which torch counts among the tensors.
_CONTEXT, _CUBLAS = 700 * 2**20, 32 * 2**20

#: What glibc's malloc can't reuse, with its own thresholds, which grow to 32 MiB: what comes and goes in a layer leaves
#: holes between what stays. As measured by `loramill-bench train`: parts of the activations, and times a layer's.
_TORN_KEPT, _TORN_LAYER = 0.18, 4

#: Copies that safetensors makes of a checkpoint: of each tensor, of all in Rust, and of that in Python.
_COPIES = 3

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
        """Those of torch alone: on a GPU what torch.cuda.max_memory_allocated tells."""
        return sum(item.bytes for item in self.items if item.name not in ("framework", "fragments"))


def row_of(spec: JobSpec, lengths: Sequence[int], learnt: float = 1.0, *, alike: bool = True) -> Row:
    """The largest row that a step may have.

    Args:
        spec: its micro_tokens, batch_size, packing and max_length count.
        lengths: tokens of the examples; nothing is longer than max_length.
        learnt: the largest share of a row's tokens that have a loss.
        alike: whether examples may begin with the same tokens, which a packed row has once, and so holds more of them.
    """
    cut = sorted((min(length, spec.max_length) for length in lengths), reverse=True) or [spec.max_length]
    longest, shortest = cut[0], cut[-1]
    step = sum(cut[place % len(cut)] for place in range(spec.batch_size))
    # A packed row is closed once it has its tokens, so the last example may stand out by all but one.
    tokens = spec.micro_tokens + longest - 1 if spec.packing else max(spec.micro_tokens, longest)
    if longest == shortest and not alike:
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
            activations(spec, base, tuned, row, device, dtype_bytes),
            logits,
            scratch(spec, base, tuned, row, device, logits, quantization, dtype_bytes),
        ],
        written=(12 + 4 * tuned.state) * tuned.weights + 4 * tuned.fixed,
        layer=one_layer(base, tuned, row, device, dtype_bytes),
        # A base in another dtype than its file's went through memory in that.
        holes=2 * base.parameters if dtype_bytes == 4 else 0,
    )


def composed(
    device: Device, kept: Sequence[Item], passing: Sequence[Item], *, written: int, layer: int, holes: int = 0
) -> Need:
    """What is kept all the time, and what a pass or, on a CPU, the writing of a checkpoint needs besides.

    Args:
        written: bytes of a checkpoint.
        layer: bytes of a layer's activations.
        holes: bytes that were freed when the base had been loaded.
    """
    items = [framework(device), *kept, *passing]
    if device == "cpu":
        sizes = {item.name: item.bytes for item in passing}
        torn = holes + round(_TORN_KEPT * sizes["activations"]) + _TORN_LAYER * layer
        writing = max(0, _COPIES * written - sum(sizes.values()))
        items += [
            Item("fragments", torn, "of freed memory that malloc can't reuse"),
            Item("checkpoint", writing, "while it is written"),
        ]
    return Need(tuple(item for item in items if item.bytes))


def framework(device: Device) -> Item:
    """What is there before any tensor."""
    if device == "cpu":
        return Item("framework", _PROCESS, "the process with its libraries")
    return Item("framework", _CONTEXT, "the CUDA context with its libraries")


def base_bytes(base: Anatomy, quantization: Quantization, device: Device, dtype_bytes: int = 2) -> int:
    """The base's weights as training keeps them.

    NF4 is packed on a GPU. A CPU has the rounded values as dense ones, beside the file's, which stay mapped.
    """
    weights = sum(linear.weights for linear in base.linears)
    whole = base.parameters * dtype_bytes
    if quantization == "none" or (device, quantization) == ("cuda", "int8"):
        return whole
    return whole + weights * dtype_bytes if device == "cpu" else round(whole + weights * (NF4_BYTES - dtype_bytes))


def logits_of(base: Anatomy, row: Row) -> Item:
    """The logits and their gradient in the base's dtype, and a copy in fp32; in fp32 the copy is the gradient."""
    return Item("logits", 8 * row.learnt * base.vocabulary, f"of {row.learnt:,} learnt tokens")


def activations(spec: JobSpec, base: Anatomy, tuned: Tuning, row: Row, device: Device, dtype_bytes: int = 2) -> Item:
    """What the layers keep for the backward pass: all that it needs, or only what enters each of them."""
    layers = base.layers - tuned.first
    if spec.gradient_checkpointing:
        kept = row.tokens * base.hidden * dtype_bytes * layers
        how = ", which are recomputed"
    else:
        own = tuned.attended * _layer(base, row, device, dtype_bytes, True)
        own += (layers - tuned.attended) * _layer(base, row, device, dtype_bytes, False)
        kept = row.tokens * (own + dtype_bytes * tuned.kept) + _cast(tuned, dtype_bytes) * tuned.copied
        # The mask, and on a CPU what it was made of.
        kept += row.tokens * row.width * (dtype_bytes + (device == "cpu"))
        how = ""
    return Item("activations", kept, f"of {row.tokens:,} tokens in {layers} layers{how}")


def scratch(
    spec: JobSpec,
    base: Anatomy,
    tuned: Tuning,
    row: Row,
    device: Device,
    logits: Item,
    quantization: Quantization = "none",
    dtype_bytes: int = 2,
) -> Item:
    """What comes and goes in the backward pass of a layer: only what exceeds the logits, which are gone by then."""
    b = dtype_bytes
    mlp = 4 * b * base.intermediate
    # Attention's come when those of the MLP, and what that kept, are gone.
    scores = 2 * b * base.heads * row.width - mlp if _eager(row, device) else 0
    passing = row.tokens * max(mlp, scores)
    if spec.gradient_checkpointing:
        passing += one_layer(base, tuned, row, device, b)
    if device == "cuda" and quantization == "nf4":
        passing += b * max(linear.weights for linear in base.linears)
    fixed = _CUBLAS if device == "cuda" else 0
    return Item("scratch", fixed + max(0, passing - logits.bytes), "what comes and goes in a layer")


def one_layer(base: Anatomy, tuned: Tuning, row: Row, device: Device, b: int) -> int:
    """Bytes that the layer with the most adapters keeps in a pass."""
    own = _layer(base, row, device, b, bool(tuned.attended)) + b * tuned.most_kept
    return row.tokens * own + _cast(tuned, b) * tuned.most_copied


def _cast(tuned: Tuning, b: int) -> int:
    """Bytes of a weight of A or B in the base's dtype, where that is not the weight itself."""
    return b if b < 4 or tuned.fixed else 0


def _layer(base: Anatomy, row: Row, device: Device, b: int, attended: bool) -> int:
    """Bytes a token that a layer keeps of its own: two norms, attention, and the gated MLP.

    A norm keeps its input: as `jobs.norm` has it in the base's dtype, as transformers has it in fp32.
    A fused kernel keeps queries, keys and values of all heads, its output, and a sum a head; plain products, as
    `jobs.attention` has them, keys and values once and each share; those of transformers these in fp32, too.
    Attention's output is also kept where it enters an adapted linear.
    """
    q, kv = base.heads * base.head_dim, base.kv_heads * base.head_dim
    if not _eager(row, device):
        attention = 4 * b * q + 4 * base.heads
    elif base.llama:
        attention = b * (q + 2 * kv + base.heads * row.width)
    else:
        attention = b * 3 * q + base.heads * row.width * (4 + b * (b < 4))
    if attended and _eager(row, device):
        attention += b * q
    norms = 2 * base.hidden * (b if device == "cpu" and base.llama else 4)
    return norms + attention + 3 * b * base.intermediate


def _eager(row: Row, device: Device) -> bool:
    return device == "cpu" and row.eager
