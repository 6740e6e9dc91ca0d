"""The configurations of every kernel that ships, of which tests compile each one.

A new kernel joins with a function from a kind of GPU and a dtype to its configurations, and an entry in `SHIPPED`.
"""

import importlib
from collections.abc import Callable, Iterator
from itertools import product

import torch

from loramill.gpus import FP8_CAPABILITY
from loramill.jobs.train.ops import fused, fused_kernels
from loramill.kernels.memory import ALIGNMENT
from loramill.kernels.triton import decoder_ops, kernels, plans, quantized_kernels

from .compiling import Configuration, GpuKind, configuration

attention_host = importlib.import_module("loramill.kernels.triton.attention")
quantized_host = importlib.import_module("loramill.kernels.triton.quantized")

#: Head dimension and query heads per KV head: SmolLM2 and Llama 3.2, 80 channels, Llama 3 and Qwen, multi-query, Gemma.
HEADS = ((64, 3), (80, 8), (128, 4), (128, 20), (256, 8))


def lora_launches(itemsize: int) -> Iterator[plans.Launch]:
    """Each kernel of each plan: a sum in one step, in several, and in as many as the widest MLP of Llama 3 takes."""
    for _, _, plan in plans.TABLE:
        for steps in (1, 4, 64):
            yield plans.shrink(plan, itemsize, steps)
        yield plans.expand(plan)
    for d_in in (100, plans.FUSED.d_in):
        yield plans.fused(d_in, itemsize)


def lora_configuration(
    launch: plans.Launch, dtype: torch.dtype, aligned: bool = True, int8: bool = False
) -> Configuration:
    """A kernel as `lora` compiles it at a q/k/v site whose dimensions are multiples of 16, or odd."""
    addresses = ("gains", "h", "table", "starts", "tiles", "tokens", "weights", "h_row")
    types = {"gains": "*fp32", "h": "*fp32", "table": "*i64", "starts": "*i32", "tiles": "*i32", "tokens": "*i64"}
    return configuration(
        launch, getattr(kernels, launch.kernel), dtype,
        in_dtype=("x", "y") if int8 else ("x", "y", "weights"),
        types={**types, "weights": "*i8", "scale": "fp32"},
        multiples=(*addresses, "x", "y", "d_in", "width", "x_row", "y_row") if aligned else addresses,
        MODULES=3, STRIDE=3, ALIGN=ALIGNMENT // (1 if int8 else dtype.itemsize), ALIGN_Y=16 if aligned else 1,
    )  # fmt: skip


def lora(gpu: GpuKind, dtype: torch.dtype) -> Iterator[Configuration]:
    """Adapters, at dimensions that are multiples of 16 and at odd ones.

    Left out are int8 at odd dimensions and for rows in float32, which no base has that is served: runs of more than 32
    rows then spill.
    """
    for launch in (*lora_launches(dtype.itemsize), plans.EMBED):
        yield lora_configuration(launch, dtype)
        yield lora_configuration(launch, dtype, aligned=False)
        if dtype != torch.float32:
            yield lora_configuration(launch, dtype, int8=True)


def attend_configuration(
    gpu: GpuKind, dtype: torch.dtype, head_dim: int, group: int, block_size: int = 16, cap: float | None = None
) -> Configuration:
    """Decode attention over one split."""
    memory = gpu.per_multiprocessor << 10
    launch = attention_host.attend_launch(group, head_dim, block_size, dtype.itemsize, memory, cap)
    return configuration(
        launch, attention_host.attend, dtype,
        in_dtype=("qkv", "keys", "values"),
        types={"totals": "*fp32", "peaks": "*fp32", "table": "*i32", "blocks": "*i32", "scale": "fp32"},
        # The blocks follow a table of any length.
        multiples=("qkv", "keys", "values", "totals", "peaks", "table", "q_row"),
    )  # fmt: skip


def attention(gpu: GpuKind, dtype: torch.dtype) -> Iterator[Configuration]:
    """Decode attention, also with the cap of Gemma 2, and the sum of its splits."""
    yield attend_configuration(gpu, dtype, 256, 2, cap=50.0)
    for head_dim, group in HEADS:
        attend = attend_configuration(gpu, dtype, head_dim, group)
        yield attend
        launch = attention_host.combine_launch(group, head_dim, attention_host.SPLITS[-1], attend.constants["KEYS"])
        yield configuration(
            launch, attention_host.combine, dtype,
            in_dtype=("out",),
            types={"totals": "*fp32", "peaks": "*fp32", "table": "*i32"},
            multiples=("out", "totals", "peaks", "table", "out_row"),
        )  # fmt: skip


#: Rows of SmolLM2, Llama 3 8B and Llama 3 70B.
WIDTHS = (576, 4096, 8192)
#: Query heads, KV heads and head dimension: SmolLM2, Llama 3, 80 channels, Gemma.
ALL_HEADS = ((9, 3, 64), (32, 8, 128), (32, 32, 80), (16, 8, 256))


def decoder(gpu: GpuKind, dtype: torch.dtype) -> Iterator[Configuration]:
    """Norms with and without a residual and an inner norm, gates, and rotations with and without norms of heads."""
    absent = ({"residual": None, "inner": None}, {"inner": None}, {})
    for d, missing in product(WIDTHS, absent):
        yield configuration(
            decoder_ops.norm_launch(d), decoder_ops.norm_row, dtype,
            in_dtype=("x", "residual", "inner", "weight", "y"),
            types={"eps": "fp32", "offset": "fp32"},
            multiples=("x", "residual", "inner", "weight", "y", "d", "x_row", "residual_row"),
            **missing,
        )  # fmt: skip
    for activation in ("silu", "gelu_tanh"):
        yield configuration(
            decoder_ops.gate_launch(activation), decoder_ops.gate_row, dtype,
            in_dtype=("gate_up", "y"), types={}, multiples=("gate_up", "y", "d", "gate_up_row"),
        )  # fmt: skip
    for shape, missing in product(ALL_HEADS, ({"q_norm": None, "k_norm": None}, {})):
        yield configuration(
            decoder_ops.rotate_launch(*shape), decoder_ops.rotate_heads, dtype,
            in_dtype=("qkv", "keys", "values", "q_norm", "k_norm"),
            types={"cos": "*fp32", "sin": "*fp32", "slots": "*i64", "eps": "fp32", "offset": "fp32"},
            multiples=("qkv", "keys", "values", "cos", "sin", "slots", "q_norm", "k_norm", "qkv_row"),
            **missing,
        )  # fmt: skip


def quantized(gpu: GpuKind, dtype: torch.dtype) -> Iterator[Configuration]:
    """Products with int8 weights, and the rounding of rows to float8 on the GPUs that have it, last."""
    for rows in (1, 32, 64):
        yield configuration(
            quantized_host.int8_launch(rows, dtype.itemsize), quantized_kernels.int8_linear, dtype,
            in_dtype=("x", "y"),
            types={"codes": "*i8", "scales": "*fp32"},
            multiples=("x", "codes", "scales", "y", "d_in", "d_out", "x_row"),
        )  # fmt: skip
    if divmod(gpu.capability, 10) >= FP8_CAPABILITY:
        yield configuration(
            quantized_host.FP8_LAUNCH, quantized_kernels.quantize_rows, dtype,
            in_dtype=("x",),
            types={"codes": "*fp8e4nv", "scales": "*fp32"},
            multiples=("x", "codes", "scales", "d_in", "x_row"),
        )  # fmt: skip


def training(gpu: GpuKind, dtype: torch.dtype) -> Iterator[Configuration]:
    """The norms, gated products and rotations of training, forward and backward."""
    for width, plus_one in product((64, *WIDTHS), (False, True)):
        tile, options = fused.norm_tile(width)
        launch = plans.Launch("norm", {**tile, "PLUS_ONE": plus_one}, options)
        for kernel in (fused_kernels.norm_forward, fused_kernels.norm_backward):
            yield configuration(
                launch, kernel, dtype, in_dtype=("x", "weight", "y", "d_y", "d_x"), types={"eps": "fp32"},
                multiples=("x", "weight", "y", "d_y", "d_x", "x_row", "d_y_row"),
            )  # fmt: skip
    for gelu in (False, True):
        launch = plans.Launch("gated", {"SIZE": fused.GATED_ELEMENTS, "GELU": gelu}, {"num_warps": fused.GATED_WARPS})
        tensors = ("gate", "up", "y", "d_y", "d_gate", "d_up")
        for kernel in (fused_kernels.gated_forward, fused_kernels.gated_backward):
            yield configuration(launch, kernel, dtype, tensors, types={}, multiples=(*tensors, "count"))
    for (heads, kv_heads, head_dim), inverse in product(ALL_HEADS, (False, True)):
        shape = {"HEADS": heads, "KV_HEADS": kv_heads, "HALF": head_dim // 2, "INVERSE": inverse}
        constants = {**shape, **fused.rotation_block(head_dim // 2)}
        tensors = ("q", "k", "cos", "sin", "q_out", "k_out")
        launch = plans.Launch("rotate", constants, {"num_warps": fused.ROTATE_WARPS})
        yield configuration(launch, fused_kernels.rotate, dtype, tensors, types={}, multiples=tensors)


#: By the name that a test shows.
SHIPPED: dict[str, Callable[[GpuKind, torch.dtype], Iterator[Configuration]]] = {
    "lora": lora,
    "attention": attention,
    "decoder": decoder,
    "quantized": quantized,
    "training": training,
}
