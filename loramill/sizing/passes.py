"""The memory of one pass: the tensors that are saved for its backward pass, and the largest temporary ones.

The layers are those of transformers and of `jobs.train.methods.layers`. `b` is the number of bytes of the base's dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from loramill.sizing.anatomy import Anatomy
from loramill.sizing.targets import TrainedElements
from loramill.types import JobSpec, Quantization

Device = Literal["cpu", "cuda"]

#: cuBLAS's workspace, which torch counts as a tensor.
_CUBLAS = 32 * 2**20

#: Rows of logits that exist at a time on a GPU (`jobs.train.ops.loss.HEAD_ROWS`).
HEAD_ROWS = 512

#: Maximum tokens for which training on a CPU computes attention by plain matrix products.
EAGER_TOKENS = 512


@dataclass(frozen=True, slots=True)
class MemoryRow:
    """The dimensions of the largest forward pass of a step.

    Attributes:
        tokens: tokens of all examples of the pass, padding included.
        width: number of tokens that attend to one another.
        supervised_tokens: tokens with a loss, which need logits.
        step_tokens: tokens of all examples of a step.
        eager: whether a CPU computes attention by plain matrix products, and so saves the scores.
    """

    tokens: int
    width: int
    supervised_tokens: int
    step_tokens: int
    eager: bool


@dataclass(frozen=True, slots=True)
class MemoryItem:
    """A part of the memory of a job."""

    name: str
    bytes: int
    description: str


def largest_row(
    spec: JobSpec, lengths: Sequence[int], supervised_fraction: float = 1.0, *, shared_prefixes: bool = True
) -> MemoryRow:
    """The largest forward pass that a step may have.

    Args:
        spec: the job; its micro_tokens, batch_size, packing and max_length matter.
        lengths: tokens of the examples; a pair has those of both answers.
        supervised_fraction: the largest fraction of a row's tokens with a loss.
        shared_prefixes: whether examples may begin with the same tokens, which a packed row contains once, so that it
            has room for more examples.
    """
    cut = sorted((min(length, spec.max_example_tokens) for length in lengths), reverse=True)
    cut = cut or [spec.max_example_tokens]
    longest, shortest = cut[0], cut[-1]
    step = sum(cut[index % len(cut)] for index in range(spec.batch_size))
    # A packed row is complete once it has its tokens, so all but one token of the last example may exceed them.
    tokens = spec.micro_tokens + longest - 1 if spec.packing else max(spec.micro_tokens, longest)
    if longest == shortest and not shared_prefixes:
        tokens -= tokens % longest
    tokens = max(longest, min(tokens, step if spec.packing else longest * spec.batch_size))
    width = tokens if spec.packing else longest
    return MemoryRow(
        tokens=tokens,
        width=width,
        supervised_tokens=max(1, min(tokens, round(tokens * supervised_fraction))),
        step_tokens=step,
        eager=width <= EAGER_TOKENS,
    )


def whole_logits(base: Anatomy, row: MemoryRow) -> MemoryItem:
    """The logits and their gradient in the base's dtype, and a copy in fp32; with fp32, the copy is the gradient."""
    return MemoryItem(
        "logits", 8 * row.supervised_tokens * base.vocabulary, f"of {row.supervised_tokens:,} supervised tokens"
    )


def logits_of(base: Anatomy, row: MemoryRow, device: Device, dtype_bytes: int = 2) -> MemoryItem:
    """The logits with a frozen head: on a GPU in parts, in the base's dtype and fp32, and the hidden states' gradient.

    On a CPU, logits in bfloat16 are not copied to fp32. The logits of a part in the base's dtype are freed before their
    gradient is converted to it.
    """
    whole = whole_logits(base, row)
    if device == "cpu" and dtype_bytes == 2:
        whole = replace(whole, bytes=whole.bytes // 2)
    if base.caps_logits:
        # The uncapped logits, and the output of tanh.
        capping = 2 * dtype_bytes * row.supervised_tokens * base.vocabulary
        return MemoryItem(whole.name, whole.bytes + capping, whole.description)
    if device == "cpu" or not base.llama_like:
        return whole
    rows = min(HEAD_ROWS, row.supervised_tokens)
    # Twice: the hidden states of these tokens, and their gradient.
    states = 2 * dtype_bytes * row.supervised_tokens * base.hidden
    return MemoryItem(whole.name, (dtype_bytes + 4) * rows * base.vocabulary + states, whole.description)


def activations(
    spec: JobSpec, base: Anatomy, trained: TrainedElements, row: MemoryRow, device: Device, dtype_bytes: int = 2
) -> MemoryItem:
    """The tensors that the layers save for the backward pass: all that it needs, or only the input of each layer."""
    layers = base.layers - trained.first_layer
    mask = 0 if needs_no_mask(base, device, dtype_bytes) else row.tokens * row.width * dtype_bytes
    if spec.gradient_checkpointing:
        kept = row.tokens * base.hidden * dtype_bytes * layers
        how = ", which are recomputed"
    else:
        own = trained.attention_outputs * token_bytes(base, row, device, dtype_bytes, True)
        own += (layers - trained.attention_outputs) * token_bytes(base, row, device, dtype_bytes, False)
        kept = (
            row.tokens * (own + dtype_bytes * trained.saved) + cast_bytes(trained, device, dtype_bytes) * trained.cast
        )
        how = ""
    return MemoryItem("activations", kept + mask, f"of {row.tokens:,} tokens in {layers} layers{how}")


def scratch(
    spec: JobSpec,
    base: Anatomy,
    trained: TrainedElements,
    row: MemoryRow,
    device: Device,
    logits: MemoryItem,
    quantization: Quantization = "none",
    dtype_bytes: int = 2,
) -> MemoryItem:
    """Temporary tensors of the backward pass of a layer, as far as they exceed the logits, which are freed by then."""
    recomputed = one_layer(base, trained, row, device, dtype_bytes) if spec.gradient_checkpointing else None
    scales_rows = spec.method == "dora"
    return pass_scratch(base, row, device, logits, quantization, dtype_bytes, recomputed, scales_rows=scales_rows)


def pass_scratch(
    base: Anatomy,
    row: MemoryRow,
    device: Device,
    logits: MemoryItem,
    quantization: Quantization,
    dtype_bytes: int,
    recomputed: int | None,
    *,
    scales_rows: bool,
) -> MemoryItem:
    """`scratch` of a pass of any jobs.

    Args:
        recomputed: what a layer saves, if layers are recomputed.
        scales_rows: whether the pass has a DoRA.
    """
    b = dtype_bytes
    # The gradients of the MLP's product and of its two factors. DoRA also scales the product's; and a layer that is not
    # recomputed has a fourth.
    mlp = (4 if recomputed is None or scales_rows else 3) * b * base.intermediate
    attention = _flash_gradients(base, b) if needs_no_mask(base, device, b) else 0
    if base.caps_attention:
        attention = (4 + b) * base.heads * row.width
    elif _eager(row, device):
        attention = 2 * b * base.heads * row.width
    # Attention's tensors are allocated after those of the MLP, the ones it saved and its product are freed.
    passing = row.tokens * max(mlp, attention - (_gated(base, device, b) + 1) * b * base.intermediate)
    if base.experts is not None:
        passing += row.tokens * b * base.experts.top_k * base.hidden  # the gradients of their outputs
    if device == "cpu" and base.norms > 2 and b == 4:
        passing += row.tokens * 2 * 4 * base.hidden  # Gemma's norms have gradients in fp32
    passing += recomputed or 0
    if device == "cuda" and quantization == "nf4":
        passing += b * max(linear.weights for linear in base.linears)
    fixed = _CUBLAS if device == "cuda" else 0
    return MemoryItem("scratch", fixed + max(0, passing - logits.bytes), "temporary tensors of a layer")


def one_layer(base: Anatomy, trained: TrainedElements, row: MemoryRow, device: Device, b: int) -> int:
    """Bytes that the layer with the most adapters saves in a pass."""
    own = token_bytes(base, row, device, b, bool(trained.attention_outputs)) + b * trained.max_layer_saved
    return row.tokens * own + cast_bytes(trained, device, b) * trained.max_layer_cast


def cast_bytes(trained: TrainedElements, device: Device, b: int) -> int:
    """Bytes of a weight of A or B that is copied for the products; 0 if it is not copied.

    A method with frozen copies joins them with what is trained. Otherwise a GPU takes weights in the base's dtype, and
    a CPU's kernels round them as they read them.
    """
    copied = trained.frozen or (b < 4 and not (device == "cpu" and b == 2))
    return b if copied else 0


def token_bytes(base: Anatomy, row: MemoryRow, device: Device, b: int, attended: bool) -> int:
    """Bytes per token that a layer of the base saves: its norms, attention, and the gated MLP.

    A norm saves its input: `jobs.train.ops` in the base's dtype, transformers in fp32. A fused kernel of attention
    saves queries, keys and values of all heads, its output, and one sum per head; one that takes fewer heads of keys
    and values saves those. The plain products of `jobs.train.ops.attention` save keys and values once, and the
    attention weights; those of transformers save the weights in fp32 too. The output of attention is also saved if it
    is the input of an adapted linear.
    """
    q, kv = base.heads * base.head_dim, base.kv_heads * base.head_dim
    if needs_no_mask(base, device, b):
        attention = 2 * b * (q + kv) + 4 * base.heads
    elif base.caps_attention:
        # transformers' own: keys and values of all heads, the output of tanh, and the attention weights, also in fp32.
        attention = 3 * b * q + base.heads * row.width * (4 + 2 * b)
    elif not _eager(row, device):
        attention = 4 * b * q + 4 * base.heads
    elif base.llama_like:
        attention = b * (q + 2 * kv + base.heads * row.width)
    else:
        attention = b * 3 * q + base.heads * row.width * (4 + b * (b < 4))
    if attended and _eager(row, device):
        attention += b * q
    # On a CPU in fp32, Gemma's norms, four of a layer, are those of transformers.
    own_norms = base.llama_like and (device == "cuda" or base.norms == 2 or b == 2)
    normalized = (base.norms * base.hidden + (q + kv) * base.head_norms) * (b if own_norms else 4)
    # The outputs of a token's experts.
    routed = 0 if base.experts is None else b * base.experts.top_k * base.hidden
    return normalized + attention + routed + _gated(base, device, b) * b * base.intermediate


def _gated(base: Anatomy, device: Device, b: int) -> int:
    """How many of three tensors of the MLP's width are saved: gate, up, and the activated gate.

    Our kernels compute the activation again: on a GPU, and on a CPU in bfloat16 that of a Llama. transformers computes
    that of experts.
    """
    ours = device == "cuda" or (b == 2 and base.norms == 2)
    return 2 if ours and base.llama_like and base.experts is None else 3


def _eager(row: MemoryRow, device: Device) -> bool:
    return device == "cpu" and row.eager


def needs_no_mask(base: Anatomy, device: Device, b: int) -> bool:
    """Whether attention needs no mask: FlashAttention on a GPU, where `jobs.train.forward` uses it."""
    known = base.head_dim % 8 == 0 and (base.head_dim <= 192 or 224 < base.head_dim <= 256)
    return device == "cuda" and b == 2 and base.llama_like and known and not base.caps_attention


def _flash_gradients(base: Anatomy, b: int) -> int:
    """Bytes per token of FlashAttention's backward pass.

    These are the gradients of queries, keys and values and of the output; a copy of the queries' in fp32, and keys' and
    values' for each query head if heads share them.
    """
    q, kv = base.heads * base.head_dim, base.kv_heads * base.head_dim
    return 2 * b * (q + kv) + 4 * q + (2 * b * q if kv < q else 0)
