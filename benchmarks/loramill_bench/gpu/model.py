"""A model of a GPU's time: bytes, operations and launches of a decode step, a prompt and a training pass.

It predicts times before a run; next to measurements, it shows which part is slower than assumed. Each constant has its
unit and its source; those marked "assumed" are corrected by the first measurements.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

from loramill.sizing.anatomy import Anatomy, anatomy, llama_of


@dataclass(frozen=True, slots=True)
class GpuLimits:
    """The limits of a GPU, from its data sheet.

    Attributes:
        bandwidth: bytes per second from its memory.
        flops: dense operations per second in bfloat16.
    """

    name: str
    bandwidth: float
    flops: float


H100 = GpuLimits("H100", 3.35e12, 989e12)
GPUS = (H100, GpuLimits("H200", 4.8e12, 989e12), GpuLimits("A100", 2.04e12, 312e12), GpuLimits("L4", 0.3e12, 121e12))

#: Fractions of the bandwidth at which cuBLAS reads the weights of a few rows, and our kernels read keys and values, and
#: adapters (assumed).
WEIGHTS_BANDWIDTH, ATTENTION_BANDWIDTH, LORA_BANDWIDTH = 0.85, 0.70, 0.65
#: Fraction of the bandwidth that elementwise kernels reach: 2.8e12 of an H100's (assumed).
ELEMENTWISE_BANDWIDTH = 0.84
#: Fractions of the operations per second that cuBLAS reaches for many rows (assumed), and FlashAttention 2 on an H100
#: (Shah et al. 2024, arXiv 2407.08608).
MATRIX_FLOPS, FLASH_FLOPS = 0.62, 0.35
#: Seconds of a small kernel in a CUDA graph, and of the launch of one outside of a graph (assumed).
GRAPH_LAUNCH, EAGER_LAUNCH = 1.9e-6, 7e-6
#: Kernels per layer of a decode: four linears; shrink and expand at each of them; attention and its sum; and between
#: them two norms with their additions, the rotation with the write to the cache, and SwiGLU.
LINEAR_LAUNCHES, LORA_LAUNCHES, ATTENTION_LAUNCHES, ELEMENTWISE_LAUNCHES = 4, 8, 2, 4
#: Times that the logits are read or written for float32 and a greedy token: bytes per logit (counted).
LOGITS_BYTES = 12
#: Seconds of the host per step and per row of it, with a model that costs nothing (measured on a server's CPU); the
#: host prepares the next step while the device computes this one.
HOST_STEP, HOST_ROW = 0.2e-3, 4.5e-6

#: Bytes per token and layer, in units of the widths, that elementwise kernels read and write in a forward pass: two
#: norms with additions, the rotation, and SwiGLU.
_NORM, _ROTATION, _SWIGLU = 2 * 4, 2, 3
#: Passes over the linears and the elementwise operations of a training pass, relative to a forward pass: the backward
#: pass computes no gradients of frozen weights; and attention's is 2.5 forward passes.
_BACKWARD, _ATTENTION_BACKWARD = 1.0, 2.5
#: Bytes per weight of a dequantization of NF4: read in 4 bits, written in bfloat16, and read by the product.
_DEQUANTIZED = 0.5 + 2 + 2
#: Kernels per layer of a training pass with recomputation (counted: 42 forward, 114 backward, 42 that dequantize), and
#: seconds of the host for the rest of a step (assumed).
_TRAINING_LAUNCHES, _TRAINING_STEP = 198, 10e-3


@dataclass(frozen=True, slots=True)
class Parts:
    """Seconds by what they are spent on; `host` is the time for which the device waits for the host."""

    linears: float = 0.0
    attention: float = 0.0
    adapters: float = 0.0
    elementwise: float = 0.0
    launches: float = 0.0
    head: float = 0.0
    host: float = 0.0

    @property
    def total(self) -> float:
        """The sum."""
        return float(sum(getattr(self, part.name) for part in fields(self)))

    def __str__(self) -> str:
        spent = ((part.name, getattr(self, part.name)) for part in fields(self))
        return ", ".join(f"{name} {1e3 * seconds:.2f}" for name, seconds in spent if seconds >= 5e-6) + " ms"


@dataclass(frozen=True, slots=True)
class Decode:
    """A decode step: answers, their positions, and the different adapters among them, of one rank at all linears."""

    rows: int
    context: int
    adapters: int
    rank: int = 16


@dataclass(frozen=True, slots=True)
class Pass:
    """A training pass over examples of equal length, half of whose tokens are supervised."""

    tokens: int
    length: int
    recompute: bool = True
    nf4: bool = True
    rank: int = 16


def linear_bytes(base: Anatomy) -> int:
    """Bytes of the layers' linears in bfloat16."""
    return 2 * sum(linear.weights for linear in base.linears)


def head_bytes(base: Anatomy) -> int:
    """Bytes of the head in bfloat16."""
    return 2 * base.vocabulary * base.hidden


def kv_bytes(base: Anatomy) -> int:
    """Bytes of a token's keys and values in bfloat16."""
    return 2 * 2 * base.layers * base.kv_heads * base.head_dim


def adapter_bytes(base: Anatomy, rank: int) -> int:
    """Bytes of an adapter at all linears in bfloat16."""
    return 2 * rank * sum(linear.d_in + linear.d_out for linear in base.linears)


def decode_bytes(base: Anatomy, step: Decode) -> int:
    """Bytes that a decode step must read: the base, the keys and values, and the adapters once each."""
    cached = step.rows * step.context * kv_bytes(base)
    return linear_bytes(base) + head_bytes(base) + cached + step.adapters * adapter_bytes(base, step.rank)


def decode_seconds(base: Anatomy, step: Decode, bandwidth: float, flops: float = H100.flops) -> Parts:
    """A decode step in a graph, greedy, with the next step prepared by the host meanwhile."""
    multiplied = 2 * step.rows * (linear_bytes(base) + head_bytes(base)) / 2 / (MATRIX_FLOPS * flops)
    read = linear_bytes(base) / (WEIGHTS_BANDWIDTH * bandwidth)
    head = head_bytes(base) / (WEIGHTS_BANDWIDTH * bandwidth) + step.rows * base.vocabulary * LOGITS_BYTES / bandwidth
    small = LINEAR_LAUNCHES + ATTENTION_LAUNCHES + ELEMENTWISE_LAUNCHES + (LORA_LAUNCHES if step.adapters else 0)
    device = Parts(
        linears=max(read, multiplied - head),
        attention=step.rows * step.context * kv_bytes(base) / (ATTENTION_BANDWIDTH * bandwidth),
        adapters=step.adapters * adapter_bytes(base, step.rank) / (LORA_BANDWIDTH * bandwidth),
        launches=(small - LINEAR_LAUNCHES) * base.layers * GRAPH_LAUNCH,
        head=head,
    )
    return _with_host(device, HOST_STEP + step.rows * HOST_ROW)


def prefill_seconds(base: Anatomy, tokens: int, cached: int, gpu: GpuLimits, rank: int = 16) -> Parts:
    """A step with one prompt of `tokens` tokens behind `cached` ones, by one adapter, outside of a graph."""
    seen = tokens * cached + tokens * tokens / 2
    device = Parts(
        linears=tokens * linear_bytes(base) / (MATRIX_FLOPS * gpu.flops),
        attention=4 * seen * base.heads * base.head_dim * base.layers / (FLASH_FLOPS * gpu.flops),
        adapters=tokens * _adapter_traffic(base, rank) / (ELEMENTWISE_BANDWIDTH * gpu.bandwidth),
        elementwise=tokens * _elementwise_bytes(base) / (ELEMENTWISE_BANDWIDTH * gpu.bandwidth),
        head=head_bytes(base) / (WEIGHTS_BANDWIDTH * gpu.bandwidth),
    )
    launches = LINEAR_LAUNCHES + LORA_LAUNCHES + ATTENTION_LAUNCHES + ELEMENTWISE_LAUNCHES
    return _with_host(device, HOST_STEP + launches * base.layers * EAGER_LAUNCH)


def training_seconds(base: Anatomy, step: Pass, gpu: GpuLimits = H100) -> Parts:
    """A step of one pass, with attention over each example, fused elementwise kernels, and logits in chunks."""
    forwards = 2 if step.recompute else 1
    passes = forwards + _BACKWARD
    supervised, t = step.tokens / 2, step.tokens
    elementwise = ELEMENTWISE_BANDWIDTH * gpu.bandwidth
    attended = 4 * t * step.length / 2 * base.heads * base.head_dim * base.layers
    dequantized = passes * linear_bytes(base) / 2 * _DEQUANTIZED / gpu.bandwidth if step.nf4 else 0.0
    device = Parts(
        linears=passes * t * linear_bytes(base) / (MATRIX_FLOPS * gpu.flops) + dequantized,
        attention=attended * (forwards + _ATTENTION_BACKWARD) / (FLASH_FLOPS * gpu.flops),
        # The gradients of A and B take as much as the forward pass of the adapters, too.
        adapters=(passes + 1) * t * _adapter_traffic(base, step.rank) / elementwise,
        elementwise=(passes + _BACKWARD) * t * _elementwise_bytes(base) / elementwise,
        # Logits and their gradient: two products, 44 bytes per logit through float32.
        head=2 * supervised * head_bytes(base) / (MATRIX_FLOPS * gpu.flops)
        + 44 * supervised * base.vocabulary / elementwise,
    )
    return _with_host(device, _TRAINING_STEP + _TRAINING_LAUNCHES * base.layers * EAGER_LAUNCH)


def _elementwise_bytes(base: Anatomy) -> int:
    """Bytes per token that the kernels between the linears of all layers read and write."""
    heads = (base.heads + 2 * base.kv_heads) * base.head_dim
    return 2 * base.layers * (_NORM * base.hidden + _ROTATION * heads + _SWIGLU * base.intermediate)


def _adapter_traffic(base: Anatomy, rank: int) -> int:
    """Bytes per token of adapters at all linears: inputs once, outputs twice, and h in float32 twice."""
    return sum(2 * linear.d_in + 2 * 2 * linear.d_out + 2 * 4 * rank for linear in base.linears)


def _with_host(device: Parts, host: float) -> Parts:
    waited = max(0.0, host - device.total)
    return Parts(
        **{part.name: getattr(device, part.name) for part in fields(device) if part.name != "host"}, host=waited
    )


_DECODES = (
    Decode(1, 1024, 0), Decode(1, 1024, 1), Decode(32, 1024, 0), Decode(32, 1024, 32), Decode(128, 512, 32)
)  # fmt: skip
_PROMPTS = ((512, 0), (2048, 0), (200, 4096))
_PASSES = (Pass(2048, 512), Pass(4096, 512), Pass(2048, 2048), Pass(2048, 512, recompute=False))


def table(billions: float = 8) -> Iterator[str]:
    """The lines of a table: bytes, decodes, prompts and training passes of a Llama of this size on each GPU."""
    base = anatomy(llama_of(billions))
    yield (
        f"Llama {billions:g}B: linears {linear_bytes(base) / 1e9:.2f} GB, head {head_bytes(base) / 1e9:.2f} GB, "
        f"{kv_bytes(base) / 1e3:.0f} kB per token of KV, {adapter_bytes(base, 16) / 1e6:.1f} MB per adapter of rank 16"
    )
    for gpu in GPUS:
        yield f"\n{gpu.name}: a decode step, rows/adapters x positions"
        for step in _DECODES:
            parts = decode_seconds(base, step, gpu.bandwidth, gpu.flops)
            ratio = parts.total / (decode_bytes(base, step) / gpu.bandwidth)
            what, speed = f"{step.rows}/{step.adapters}x{step.context}", step.rows / parts.total
            yield f"  {what}: {1e3 * parts.total:.1f} ms, {ratio:.2f} of the floor, {speed:,.0f} tokens/s ({parts})"
        for tokens, cached in _PROMPTS:
            parts = prefill_seconds(base, tokens, cached, gpu)
            yield f"  prompt of {tokens} behind {cached}: {1e3 * parts.total:.1f} ms ({parts})"
        for each in _PASSES:
            parts, how = training_seconds(base, each, gpu), "" if each.recompute else ", nothing recomputed"
            speed = each.tokens / parts.total
            yield f"  training, {each.tokens} of {each.length}{how}: {speed:,.0f} tokens/s ({parts})"
