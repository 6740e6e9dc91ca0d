"""Runs a step through all layers in one call of the native kernels."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_double, c_int64, c_void_p
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch

from loramill.errors import EngineFault
from loramill.kernels.adapters.slab import SiteSlab, Slab
from loramill.kernels.backend import LayerKV, Weight
from loramill.kernels.cpu import decoder_ops
from loramill.kernels.cpu.layout import OUTPUTS
from loramill.kernels.layers import Layer, Linear, Mlp, Stack, Step


class Matrix(ctypes.Structure):
    """`matrix` of operations.h."""

    _fields_ = (("data", c_void_p), ("scales", c_void_p), ("levels", c_void_p), ("group", c_int64))


class _Linear(ctypes.Structure):
    """`linear` of layers.c."""

    _fields_ = (
        ("weight", Matrix),
        *((name, c_void_p) for name in ("bias", "table", "widths")),
        *((name, c_int64) for name in ("modules", "d_in", "d_out", "in_blocks")),
    )


class _Layer(ctypes.Structure):
    """`layer` of layers.c."""

    _fields_ = (
        *((name, c_void_p) for name in ("input_norm", "q_norm", "k_norm", "post_norm", "next_norm")),
        *((name, _Linear) for name in ("qkv", "o", "gate_up", "down")),
        *((name, c_void_p) for name in ("keys", "values")),
        ("window", c_int64),
    )


_NUMBERS = (
    "rows",
    "hidden",
    "queries",
    "kv_heads",
    "head_dim",
    "intermediate",
    "block_size",
    "unit_count",
    "score_cost",
)


class _Step(ctypes.Structure):
    """`step` of layers.c."""

    _fields_ = (
        *((name, c_void_p) for name in ("x", "h", "qkv", "heads", "gate_up", "inner")),
        *((name, c_void_p) for name in ("cos", "sin", "slots", "blocks", "spans", "units")),
        *((name, c_int64) for name in _NUMBERS),
        ("arena", c_void_p),
        *((name, c_int64) for name in ("slots_stride", "piece_count", "bytes")),
        ("pieces", c_void_p),
        ("eps", c_double),
        ("scale", c_double),
    )


@dataclass(frozen=True, slots=True)
class _Bound:
    """The addresses of a stack, a cache and a slab; valid as long as these are the same."""

    stack: Stack
    cache: Sequence[LayerKV]
    layers: ctypes.Array[_Layer]


_bound: WeakKeyDictionary[Slab, _Bound] = WeakKeyDictionary()


def run_layers(
    library: ctypes.CDLL,
    stack: Stack,
    x: torch.Tensor,
    cache: Sequence[LayerKV],
    step: Step,
    pieces: tuple[int, int],
) -> torch.Tensor:
    """Runs all layers; `pieces` are the address and number of the batch's pieces. See `RunsLayers.run_layers`."""
    kv, first = cache[0], stack.layers[0]
    (rows, hidden), (ld, gap) = x.shape, x.stride()
    step.pages.check(rows, kv.keys.shape[0], kv.block_size)
    step.slab.check(step.batch)
    angles = (rows, kv.head_dim // 2)
    if step.slab.dtype != x.dtype and (step.slab.dtype, x.dtype) != (torch.int8, torch.bfloat16):
        raise EngineFault(f"Adapters in {step.slab.dtype} can't be applied to rows in {x.dtype}.")
    if ld != hidden or gap != 1 or step.batch.rows != rows or not x.dtype == kv.keys.dtype == first.qkv.weight.dtype:
        raise EngineFault(
            f"x is {x.dtype} {[rows, hidden]} with strides {x.stride()} for a batch of {step.batch.rows} rows; it must "
            f"be {first.qkv.weight.dtype} with contiguous rows."
        )
    for angle in (step.cos, step.sin):
        if angle.shape != angles or angle.dtype != torch.float32 or not angle.is_contiguous():
            raise EngineFault(f"The angles are {angle.dtype} {list(angle.shape)}; they must be float32 {list(angles)}.")
    columns, intermediate = stack.heads * kv.head_dim, _mlp(first).down.weight.d_in
    widths = (first.qkv.weight.d_out, columns, 2 * intermediate, intermediate)
    h, room = torch.empty_like(x), x.new_empty(rows, sum(max(width, hidden) for width in widths))
    starts = [room.data_ptr()]
    for width in widths[:-1]:
        starts.append(starts[-1] + rows * max(width, hidden) * x.element_size())
    plan = decoder_ops.attention_plan(step.pages, stack.heads // kv.kv_heads)
    values = _Step(
        x.data_ptr(), h.data_ptr(), *starts,
        step.cos.data_ptr(), step.sin.data_ptr(), decoder_ops.slot_address(step.pages),
        plan.blocks, plan.spans, plan.address,
        rows, hidden, stack.heads, kv.kv_heads, kv.head_dim, intermediate, kv.block_size, plan.count,
        plan.scores * kv.head_dim,
        step.slab.arena_address, step.slab.table.shape[2], pieces[1], step.slab.dtype == torch.int8, pieces[0],
        stack.eps, kv.head_dim**-0.5,
    )  # fmt: skip
    layers = _layers(stack, cache, step.slab)
    if library.run_layers(ctypes.byref(layers), len(layers), ctypes.byref(values)):
        raise MemoryError
    return h


def matrix(weight: Weight) -> Matrix:
    """A weight as the kernels take it."""
    codebook = weight.codebook
    if codebook is None:
        return Matrix(weight.data.data_ptr())
    levels = None if codebook.levels is None else codebook.levels.data_ptr()
    return Matrix(weight.data.data_ptr(), codebook.scales.data_ptr(), levels, codebook.group)


def in_blocks(widths: tuple[int, ...]) -> bool:
    """Whether each module but the last fills whole blocks of the weight's outputs."""
    return not any(width % OUTPUTS for width in widths[:-1])


def _layers(stack: Stack, cache: Sequence[LayerKV], slab: Slab) -> ctypes.Array[_Layer]:
    bound = _bound.get(slab)
    if bound is None or bound.stack is not stack or bound.cache is not cache:
        norms = [*(layer.input_norm for layer in stack.layers[1:]), stack.norm]
        layers = [_layer(*each, slab) for each in zip(stack.layers, norms, cache, strict=True)]
        bound = _bound[slab] = _Bound(stack, cache, (_Layer * len(layers))(*layers))
    return bound.layers


def _layer(layer: Layer, next_norm: torch.Tensor, kv: LayerKV, slab: Slab) -> _Layer:
    norms = (layer.input_norm, layer.q_norm, layer.k_norm, layer.post_norm, next_norm)
    mlp = _mlp(layer)
    linears = (layer.qkv, layer.o, mlp.gate_up, mlp.down)
    return _Layer(
        *(None if norm is None else norm.data_ptr() for norm in norms),
        *(_linear(linear, slab.views[linear.site]) for linear in linears),
        kv.keys.data_ptr(),
        kv.values.data_ptr(),
        decoder_ops.UNLIMITED if layer.window is None else layer.window,
    )


def _mlp(layer: Layer) -> Mlp:
    """The MLP of a layer of a plain stack."""
    assert isinstance(layer.mlp, Mlp)
    return layer.mlp


def _linear(linear: Linear, site: SiteSlab) -> _Linear:
    widths, weight = site.site.widths, linear.weight
    bias = None if linear.bias is None else linear.bias.data_ptr()
    return _Linear(
        matrix(weight), bias, site.table_address, site.widths_address,
        len(widths), weight.d_in, weight.d_out, in_blocks(widths),
    )  # fmt: skip
