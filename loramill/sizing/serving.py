"""The limits of an engine that follow from its device: sizes of caches and of steps, and the speed to expect."""

from __future__ import annotations

from dataclasses import dataclass

from loramill.errors import NotEnoughMemory
from loramill.gpus import CONTEXT_BYTES
from loramill.settings import ServeSettings
from loramill.sizing.anatomy import Anatomy, LinearShape
from loramill.types import GpuInfo, Quantization, ServedQuantization

#: Bytes per second that a GPU reads from its memory (data sheets of NVIDIA), by a part of its name; the first match.
_BANDWIDTHS = {
    "gb300": 8.0e12, "gb200": 8.0e12, "b300": 8.0e12, "b200": 8.0e12, "gh200": 4.0e12, "h200": 4.8e12, "h100": 3.35e12,
    "h20": 4.0e12, "a100": 1.55e12, "a800": 1.55e12, "rtx pro 6000": 1.79e12, "l40s": 0.86e12, "l40": 0.86e12,
    "l4": 0.3e12, "a6000": 0.77e12, "a40": 0.7e12, "a30": 0.93e12, "a10": 0.6e12, "5090": 1.79e12, "4090": 1.0e12,
    "3090": 0.94e12,
}  # fmt: skip
_OTHER_BANDWIDTH = 0.4e12
#: Duration of a step, divided by the time in which its bytes can be read.
_STEP_OVERHEAD = 1.5
#: Positions of an answer in the middle of its generation.
_TYPICAL_CONTEXT = 1024

#: Fraction of the memory without the base for adapters, and their rank and number for which more is of no use.
_ADAPTERS, _LARGE_RANK = 0.1, 32
#: Scores with a cap that exist at a time (`kernels.attention.capped.SCORES` in float32), and their softmax.
_CAPPED_SCORES = 2 * 128 * 2**20
#: CUDA graphs with their buffers, and the fraction of the memory that the allocator loses in gaps.
_GRAPHS, _GAPS = 512 * 2**20, 0.05
#: Keys and values that prefills copy at once, unless one sequence has more (`loramill.kernels.attention.paged`).
_GATHERED = 256 * 2**20
#: Logits that are sampled from at once (`SLICE_BYTES` of `loramill.serve.engine.sampling.logprobs`, 8 bytes each), and
#: the bytes that this takes per logit with all filters: 58.5 were counted.
_SAMPLED_AT_ONCE, _SAMPLING = 8 * 2**20, 60
#: Bytes per logit of all answers in the sampler's table of penalties and biases.
_SHIFTS = 9
#: The norms of an imported DoRA (four times `CHUNK_BYTES` of `loramill.serve.model.norms`), and cuBLAS' workspaces.
_LOADS = 64 * 2**20
#: Tokens per step on a GPU, which waits for its memory with fewer; smaller steps if one would take more of the memory.
_BATCH_TOKENS, _STEP_SHARE = (2048, 1024, 512, 256), 0.25
#: The smallest useful KV cache, in tokens.
_MIN_KV_TOKENS = 512


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """The limits of an engine.

    Attributes:
        max_batch_tokens, max_waiting, kv_tokens, adapter_bytes, host_bytes: as in `ServeSettings`.
        tokens_per_second: the speed of a fully loaded engine, until it is measured.
    """

    max_batch_tokens: int
    max_waiting: int
    kv_tokens: int
    adapter_bytes: int
    host_bytes: int
    tokens_per_second: float

    def __str__(self) -> str:
        return (
            f"KV cache of {self.kv_tokens:,} tokens, {self.adapter_bytes / 2**30:.1f} GiB for adapters, "
            f"{self.host_bytes / 2**30:.1f} GiB of host memory for further ones, steps of {self.max_batch_tokens:,} "
            f"tokens, {self.max_waiting} waiting requests"
        )


def cpu_limits(settings: ServeSettings) -> EngineLimits:
    """The limits on a CPU, where more tokens per step make answers arrive in larger pieces and no sooner."""
    return _with_settings(EngineLimits(128, 16, 32768, 2**30, 2**28, 500.0), settings)


def gpu_limits(
    gpu: GpuInfo,
    base: Anatomy,
    quantization: ServedQuantization,
    settings: ServeSettings,
    *,
    free_bytes: int,
    host_free_bytes: int,
) -> EngineLimits:
    """The limits of an engine on a GPU: what the settings fix, and what the memory holds.

    Args:
        gpu: the GPU.
        base: the base that it serves.
        quantization: that of the base.
        settings: the limits that are set are kept.
        free_bytes: the engine's memory of the GPU without the base's weights.
        host_free_bytes: free memory of the host.

    Raises:
        NotEnoughMemory: what the base leaves is too small for a KV cache.
    """
    batch = settings.max_batch_tokens or _batch_tokens(base, quantization, settings, free_bytes)
    adapters = settings.adapter_bytes or _adapter_bytes(base, settings, free_bytes)
    step = _step_bytes(base, quantization, batch, settings.max_sequences, free_bytes)
    left = free_bytes - adapters - step - round(_GAPS * free_bytes)
    # Blocks beyond twice the longest sequences would only hold prefixes that are hardly used again.
    useful = 2 * settings.max_sequences * base.context
    kv_tokens = settings.kv_tokens or min(useful, left // kv_token_bytes(base)) // 16 * 16
    if kv_tokens < _MIN_KV_TOKENS:
        raise NotEnoughMemory(
            f"{gpu.name} has {max(0, free_bytes) / 1e9:.1f} GB for the engine besides the base, which is too little: "
            f"a step takes {step / 1e9:.1f} GB and adapters take {adapters / 1e9:.1f} GB. Raise serve.gpu_fraction, "
            f"lower serve.max_batch_tokens, {_quantize_hint(base)}, or use a larger GPU."
        )
    default = EngineLimits(
        max_batch_tokens=batch,
        max_waiting=4 * settings.max_sequences,
        kv_tokens=kv_tokens,
        adapter_bytes=adapters,
        host_bytes=max(2**28, min(2 * adapters, host_free_bytes // 8)),
        tokens_per_second=expected_speed(gpu, base, quantization, settings.max_sequences),
    )
    return _with_settings(default, settings)


def planned_limits(
    gpu: GpuInfo, base: Anatomy, quantization: Quantization, settings: ServeSettings, host_free_bytes: int
) -> EngineLimits:
    """The limits that an engine will have on a GPU, before it is there.

    Args:
        gpu: the GPU.
        base: the base that it will serve.
        quantization: that of the base for training; the engine may store it in float8 by the settings.
        settings: the engine's settings.
        host_free_bytes: free memory of the host.

    Raises:
        SettingsInvalid: the settings quantize a base that is quantized already.
        NotEnoughMemory: the base does not fit into the engine's share of the GPU, or leaves no memory for a KV cache.
    """
    share = round((settings.gpu_fraction or 1.0) * gpu.bytes)
    served = settings.served_quantization(quantization)
    weights = served_weight_bytes(base, served)
    free = share - CONTEXT_BYTES - weights
    if free < 0:
        raise NotEnoughMemory(
            f"The base's weights take {weights / 1e9:.1f} GB, and the engine has {share / 1e9:.1f} GB of {gpu}: raise "
            f"serve.gpu_fraction, {_quantize_hint(base)}, or use a larger GPU."
        )
    return gpu_limits(gpu, base, served, settings, free_bytes=free, host_free_bytes=host_free_bytes)


def _quantize_hint(base: Anatomy) -> str:
    """How to quantize a base; the linears of a mixture of experts can be in float8 alone."""
    nf4 = "" if base.experts else 'quantization = "nf4", or '
    return f'quantize the base ({nf4}serve.quantization = "fp8")'


def served_weight_bytes(base: Anatomy, quantization: ServedQuantization) -> int:
    """Bytes of the base's weights in an engine on a GPU."""
    of_linears = sum(linear.weights for linear in base.linears)
    others = 2 * (base.parameters - of_linears)
    return others + sum(_linear_bytes(linear, quantization) for linear in base.linears)


def _linear_bytes(linear: LinearShape, quantization: ServedQuantization) -> int:
    """Bytes of a linear, as `kernels.triton.quantized` keeps it: a shape that has no product stays in bfloat16.

    NF4 takes 4 bits and an fp32 scale per 64 weights, int8 and float8 8 bits and an fp32 scale per output.
    """
    if quantization == "nf4" and linear.d_in % 64 == 0:
        return linear.weights // 2 + linear.weights // 64 * 4
    if quantization == "int8" or (quantization == "fp8" and linear.d_in % 16 == linear.d_out % 16 == 0):
        return linear.weights + 4 * linear.d_out
    return 2 * linear.weights


def kv_token_bytes(base: Anatomy) -> int:
    """Bytes of one token's keys and values in all layers, in bfloat16."""
    return 2 * 2 * base.layers * base.kv_heads * base.head_dim


def expected_speed(gpu: GpuInfo, base: Anatomy, quantization: ServedQuantization, sequences: int) -> float:
    """Tokens per second of an engine that decodes this number of sequences at once, which is bound by memory."""
    name = gpu.name.lower()
    bandwidth = next((speed for part, speed in _BANDWIDTHS.items() if part in name), _OTHER_BANDWIDTH)
    # Experts that no sequence chooses are not read; they are never quantized.
    idle = 0 if base.experts is None else 2 * base.experts.idle_weights(sequences)
    bytes_ = served_weight_bytes(base, quantization) - idle + sequences * _TYPICAL_CONTEXT * kv_token_bytes(base)
    return sequences / (_STEP_OVERHEAD * bytes_ / bandwidth)


def _batch_tokens(base: Anatomy, quantization: ServedQuantization, settings: ServeSettings, free_bytes: int) -> int:
    def fits(tokens: int) -> bool:
        return _step_bytes(base, quantization, tokens, settings.max_sequences, free_bytes) <= _STEP_SHARE * free_bytes

    return next(filter(fits, _BATCH_TOKENS), _BATCH_TOKENS[-1])


def _adapter_bytes(base: Anatomy, settings: ServeSettings, free_bytes: int) -> int:
    largest = sum(linear.d_in + linear.d_out for linear in base.linears) * _LARGE_RANK * settings.adapter_bits // 8
    share = max(round(_ADAPTERS * free_bytes), min(2**30, free_bytes // 4))
    return max(2**20, min(share, settings.adapter_slots * largest))


def _step_bytes(
    base: Anatomy, quantization: ServedQuantization, batch_tokens: int, sequences: int, free_bytes: int
) -> int:
    """Memory of a step, the graphs, and loads meanwhile.

    The layers take activations, gathered keys and values of prompts, and a matrix that is dequantized for a step with
    many rows, or its rows in float8. When they are done, there are the logits of all tokens (an echo with log
    probabilities) and the sampler's tensors.
    """
    attention = (base.heads + 2 * base.kv_heads) * base.head_dim
    routed = 0 if base.experts is None else 3 * base.experts.top_k * base.hidden
    activations = 2 * batch_tokens * (6 * base.hidden + 3 * base.intermediate + 2 * attention + routed)
    gathered = max(_GATHERED, min(kv_token_bytes(base) * base.context, free_bytes) // base.layers)
    if base.caps_attention:
        gathered += _CAPPED_SCORES
    # Twice the largest linear, in bfloat16: gate and up are one matrix.
    dequantized = 4 * max(linear.weights for linear in base.linears) if quantization in ("nf4", "int8") else 0
    rounded = batch_tokens * base.intermediate if quantization == "fp8" else 0
    logits, answers = 6 * batch_tokens * base.vocabulary, sequences * base.vocabulary
    sampled = _SAMPLING * min(answers, max(_SAMPLED_AT_ONCE, base.vocabulary))
    step = max(activations + gathered + dequantized + rounded, logits + sampled)
    return step + _SHIFTS * answers + _GRAPHS + _LOADS


def _with_settings(default: EngineLimits, settings: ServeSettings) -> EngineLimits:
    def chosen(value: int | None, otherwise: int) -> int:
        return otherwise if value is None else value

    return EngineLimits(
        max_batch_tokens=chosen(settings.max_batch_tokens, default.max_batch_tokens),
        max_waiting=chosen(settings.max_waiting, default.max_waiting),
        kv_tokens=chosen(settings.kv_tokens, default.kv_tokens),
        adapter_bytes=chosen(settings.adapter_bytes, default.adapter_bytes),
        host_bytes=chosen(settings.host_bytes, default.host_bytes),
        tokens_per_second=default.tokens_per_second,
    )
