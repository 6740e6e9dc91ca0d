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
from loramill.sizing.targets import TrainedElements, trained_elements
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
_FRAGMENTED_ACTIVATIONS, _FRAGMENTED_LAYERS = 0.18, 4

#: Copies that safetensors makes of a checkpoint: of each tensor, of all in Rust, and of that in Python.
_COPIES = 3

#: Up to this many tokens, training on a CPU attends by plain matrix products.
EAGER_TOKENS = 512


@dataclass(frozen=True, slots=True)
class MemoryRow:
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
    supervised_tokens: int
    step_tokens: int
    eager: bool


@dataclass(frozen=True, slots=True)
class MemoryItem:
    """A part of what a job needs."""

    name: str
    bytes: int
    description: str


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """What a job needs at its peak; `host` is what DeepSpeed moves out of the GPU's memory."""

    items: tuple[MemoryItem, ...]
    host_bytes: int = 0

    @property
    def bytes(self) -> int:
        """All of it."""
        return sum(item.bytes for item in self.items)

    @property
    def tensors(self) -> int:
        """Those of torch alone: on a GPU what torch.cuda.max_memory_allocated tells."""
        return sum(item.bytes for item in self.items if item.name not in ("framework", "fragments"))


def largest_row(
    spec: JobSpec, lengths: Sequence[int], supervised_fraction: float = 1.0, *, shared_prefixes: bool = True
) -> MemoryRow:
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
    if longest == shortest and not shared_prefixes:
        tokens -= tokens % longest
    tokens = max(longest, min(tokens, step if spec.packing else longest * spec.batch_size))
    return MemoryRow(
        tokens=tokens,
        width=tokens if spec.packing else longest,
        supervised_tokens=max(1, min(tokens, round(tokens * supervised_fraction))),
        step_tokens=step,
        eager=longest + spec.micro_tokens <= EAGER_TOKENS,
    )


def estimate(
    spec: JobSpec,
    base: Anatomy,
    quantization: Quantization,
    row: MemoryRow,
    device: Device,
    dtype_bytes: int = 2,
    trained: TrainedElements | None = None,
) -> MemoryEstimate:
    """What a job of any method but "full" needs on its device.

    Args:
        tuned: `tuning(spec, base)`, where it is known already.

    Raises:
        InvalidRequest: a target, layer or pattern matches nothing.
    """
    trained = trained or trained_elements(spec, base)
    logits = logits_of(base, row)
    return total(
        device,
        [
            MemoryItem(
                "base", base_bytes(base, quantization, device, dtype_bytes), f"{base.parameters / 1e9:.3g}B weights"
            ),
            MemoryItem("adapter", 4 * (trained.weights + trained.frozen), f"{trained.weights:,} weights in fp32"),
            MemoryItem("optimizer", (8 + 4 * trained.extra_state) * trained.weights, "two moments of AdamW in fp32"),
        ],
        [
            MemoryItem("gradients", 4 * trained.gradients, "in fp32"),
            activations(spec, base, trained, row, device, dtype_bytes),
            logits,
            scratch(spec, base, trained, row, device, logits, quantization, dtype_bytes),
        ],
        checkpoint_bytes=(12 + 4 * trained.extra_state) * trained.weights + 4 * trained.frozen,
        layer_bytes=one_layer(base, trained, row, device, dtype_bytes),
        # A base in another dtype than its file's went through memory in that.
        hole_bytes=2 * base.parameters if dtype_bytes == 4 else 0,
    )


def total(
    device: Device,
    resident: Sequence[MemoryItem],
    transient: Sequence[MemoryItem],
    *,
    checkpoint_bytes: int,
    layer_bytes: int,
    hole_bytes: int = 0,
) -> MemoryEstimate:
    """What is kept all the time, and what a pass or, on a CPU, the writing of a checkpoint needs besides.

    Args:
        written: bytes of a checkpoint.
        layer: bytes of a layer's activations.
        holes: bytes that were freed when the base had been loaded.
    """
    items = [framework(device), *resident, *transient]
    if device == "cpu":
        sizes = {item.name: item.bytes for item in transient}
        torn = hole_bytes + round(_FRAGMENTED_ACTIVATIONS * sizes["activations"]) + _FRAGMENTED_LAYERS * layer_bytes
        writing = max(0, _COPIES * checkpoint_bytes - sum(sizes.values()))
        items += [
            MemoryItem("fragments", torn, "of freed memory that malloc can't reuse"),
            MemoryItem("checkpoint", writing, "while it is written"),
        ]
    return MemoryEstimate(tuple(item for item in items if item.bytes))


def framework(device: Device) -> MemoryItem:
    """What is there before any tensor."""
    if device == "cpu":
        return MemoryItem("framework", _PROCESS, "the process with its libraries")
    return MemoryItem("framework", _CONTEXT, "the CUDA context with its libraries")


def base_bytes(base: Anatomy, quantization: Quantization, device: Device, dtype_bytes: int = 2) -> int:
    """The base's weights as training keeps them.

    NF4 is packed on a GPU. A CPU has the rounded values as dense ones, beside the file's, which stay mapped.
    """
    weights = sum(linear.weights for linear in base.linears)
    whole = base.parameters * dtype_bytes
    if quantization == "none" or (device, quantization) == ("cuda", "int8"):
        return whole
    return whole + weights * dtype_bytes if device == "cpu" else round(whole + weights * (NF4_BYTES - dtype_bytes))


def logits_of(base: Anatomy, row: MemoryRow) -> MemoryItem:
    """The logits and their gradient in the base's dtype, and a copy in fp32; in fp32 the copy is the gradient."""
    return MemoryItem(
        "logits", 8 * row.supervised_tokens * base.vocabulary, f"of {row.supervised_tokens:,} learnt tokens"
    )


def activations(
    spec: JobSpec, base: Anatomy, tuned: TrainedElements, row: MemoryRow, device: Device, dtype_bytes: int = 2
) -> MemoryItem:
    """What the layers keep for the backward pass: all that it needs, or only what enters each of them."""
    layers = base.layers - tuned.first_layer
    if spec.gradient_checkpointing:
        kept = row.tokens * base.hidden * dtype_bytes * layers
        how = ", which are recomputed"
    else:
        own = tuned.attention_outputs * _layer(base, row, device, dtype_bytes, True)
        own += (layers - tuned.attention_outputs) * _layer(base, row, device, dtype_bytes, False)
        kept = row.tokens * (own + dtype_bytes * tuned.saved) + _cast(tuned, dtype_bytes) * tuned.cast
        # The mask, and on a CPU what it was made of.
        kept += row.tokens * row.width * (dtype_bytes + (device == "cpu"))
        how = ""
    return MemoryItem("activations", kept, f"of {row.tokens:,} tokens in {layers} layers{how}")


def scratch(
    spec: JobSpec,
    base: Anatomy,
    tuned: TrainedElements,
    row: MemoryRow,
    device: Device,
    logits: MemoryItem,
    quantization: Quantization = "none",
    dtype_bytes: int = 2,
) -> MemoryItem:
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
    return MemoryItem("scratch", fixed + max(0, passing - logits.bytes), "what comes and goes in a layer")


def one_layer(base: Anatomy, tuned: TrainedElements, row: MemoryRow, device: Device, b: int) -> int:
    """Bytes that the layer with the most adapters keeps in a pass."""
    own = _layer(base, row, device, b, bool(tuned.attention_outputs)) + b * tuned.max_layer_saved
    return row.tokens * own + _cast(tuned, b) * tuned.max_layer_cast


def _cast(tuned: TrainedElements, b: int) -> int:
    """Bytes of a weight of A or B in the base's dtype, where that is not the weight itself."""
    return b if b < 4 or tuned.frozen else 0


def _layer(base: Anatomy, row: MemoryRow, device: Device, b: int, attended: bool) -> int:
    """Bytes a token that a layer keeps of its own: two norms, attention, and the gated MLP.

    A norm keeps its input: as `jobs.norm` has it in the base's dtype, as transformers has it in fp32.
    A fused kernel keeps queries, keys and values of all heads, its output, and a sum a head; plain products, as
    `jobs.attention` has them, keys and values once and each share; those of transformers these in fp32, too.
    Attention's output is also kept where it enters an adapted linear.
    """
    q, kv = base.heads * base.head_dim, base.kv_heads * base.head_dim
    if not _eager(row, device):
        attention = 4 * b * q + 4 * base.heads
    elif base.llama_like:
        attention = b * (q + 2 * kv + base.heads * row.width)
    else:
        attention = b * 3 * q + base.heads * row.width * (4 + b * (b < 4))
    if attended and _eager(row, device):
        attention += b * q
    norms = 2 * base.hidden * (b if device == "cpu" and base.llama_like else 4)
    return norms + attention + 3 * b * base.intermediate


def _eager(row: MemoryRow, device: Device) -> bool:
    return device == "cpu" and row.eager
