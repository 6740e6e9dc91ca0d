"""The layers of a Llama-like decoder, and a step through all of them over a backend's operations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch

from loramill.kernels.adapters.slab import Slab
from loramill.kernels.backend import Activation, HeadNorms
from loramill.kernels.batch import Batch
from loramill.kernels.experts import Experts, run_experts

if TYPE_CHECKING:
    from loramill.kernels.backend import Backend, LayerKV, Weight
    from loramill.kernels.paging import Pages


@dataclass(frozen=True, slots=True)
class Linear:
    """One linear, or several fused by rows.

    Attributes:
        weight: [d_out, d_in].
        bias: [d_out], or None.
        site: Index of its adapters' site.
    """

    weight: Weight
    bias: torch.Tensor | None
    site: int


@dataclass(frozen=True, slots=True)
class Mlp:
    """A gated MLP."""

    gate_up: Linear
    down: Linear


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer.

    Attributes:
        q_norm: Norm of each query head, as in Qwen3; None in other families.
        k_norm: Norm of each key head, likewise.
        post_norm: Norm of the residual after attention: the input of the MLP.
        window: Number of positions that a row sees, including its own; None: all.
        attention_norm: Norm of attention's output before it is added to the residual, as in Gemma 2; None: none.
        mlp_norm: Norm of the MLP's output, likewise.
    """

    input_norm: torch.Tensor
    qkv: Linear
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    o: Linear
    post_norm: torch.Tensor
    mlp: Mlp | Experts
    window: int | None
    attention_norm: torch.Tensor | None = None
    mlp_norm: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class Stack:
    """The layers of a decoder and its final norm.

    Attributes:
        layers: At least one.
        norm: The final norm.
        heads: Number of query heads.
        eps: Epsilon of all norms.
        norm_offset: A number that is added to the weights of all norms.
        activation: The activation of the gates of all layers.
        scale: Factor of the scores of attention; None: `head_dim ** -0.5`.
        cap: Scores become `cap * tanh(score / cap)`; None: they are not capped.
    """

    layers: tuple[Layer, ...]
    norm: torch.Tensor
    heads: int
    eps: float
    norm_offset: float = 0.0
    activation: Activation = "silu"
    scale: float | None = None
    cap: float | None = None

    @cached_property
    def is_plain(self) -> bool:
        """Whether the layers have only features of the families Llama, Mistral, Qwen2 and Qwen3."""
        return (
            (self.norm_offset, self.activation, self.scale, self.cap) == (0.0, "silu", None, None)
            and all(isinstance(layer.mlp, Mlp) for layer in self.layers)
            and all(layer.attention_norm is None and layer.mlp_norm is None for layer in self.layers)
        )


@dataclass(frozen=True, slots=True)
class Step:
    """What all layers of a step share.

    Attributes:
        cos: float32 [rows, head_dim / 2]: of the rows' rotary angles.
        sin: Like cos.
        pages: The paging.
        slab: The adapters.
        batch: The adapter of each row.
        local: Cosine and sine for the layers with a window; None: those of all layers.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    pages: Pages
    slab: Slab
    batch: Batch
    local: tuple[torch.Tensor, torch.Tensor] | None = None

    def angles(self, layer: Layer) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine for a layer."""
        return (self.cos, self.sin) if self.local is None or layer.window is None else self.local


@runtime_checkable
class RunsLayers(Protocol):
    """A backend that runs all layers of a plain stack at once, with the same bits."""

    def run_layers(self, stack: Stack, x: torch.Tensor, cache: Sequence[LayerKV], step: Step) -> torch.Tensor:
        """Like `loramill.kernels.layers.run_layers`."""


def run_layers(ops: Backend, stack: Stack, x: torch.Tensor, cache: Sequence[LayerKV], step: Step) -> torch.Tensor:
    """Runs the rows of a step through all layers.

    Args:
        ops: The backend that laid out the weights, the cache and the slab.
        stack: The layers.
        x: [rows, d], the embedded tokens; becomes the residual after the last layer.
        cache: One `LayerKV` per layer; gets the rows' keys and values.
        step: Angles, paging and adapters of the rows.

    Returns:
        [rows, d], the normalized residual.
    """
    if isinstance(ops, RunsLayers) and stack.is_plain:
        return ops.run_layers(stack, x, cache, step)
    return run_one_by_one(ops, stack, x, cache, step)


def run_one_by_one(ops: Backend, stack: Stack, x: torch.Tensor, cache: Sequence[LayerKV], step: Step) -> torch.Tensor:
    """`run_layers` as a sequence of the backend's other operations."""
    norm = stack.eps, stack.norm_offset
    h = ops.rms_norm(x, stack.layers[0].input_norm, *norm)
    next_norms = [*(layer.input_norm for layer in stack.layers[1:]), stack.norm]
    for layer, kv, next_norm in zip(stack.layers, cache, next_norms, strict=True):
        h = _attention(ops, stack, layer, h, kv, step)
        h = ops.add_rms_norm(x, h, layer.post_norm, *norm, layer.attention_norm)
        h = ops.add_rms_norm(x, _mlp(ops, stack, layer.mlp, h, step), next_norm, *norm, layer.mlp_norm)
    return h


def _attention(ops: Backend, stack: Stack, layer: Layer, h: torch.Tensor, kv: LayerKV, step: Step) -> torch.Tensor:
    qkv = _linear(ops, layer.qkv, h, step)
    norms = None
    if layer.q_norm is not None and layer.k_norm is not None:
        norms = HeadNorms(layer.q_norm, layer.k_norm, stack.eps, stack.norm_offset)
    ops.rope_write(qkv, stack.heads, *step.angles(layer), kv, step.pages, norms)
    scale = kv.head_dim**-0.5 if stack.scale is None else stack.scale
    return _linear(ops, layer.o, ops.attention(qkv, stack.heads, kv, step.pages, scale, layer.window, stack.cap), step)


def _mlp(ops: Backend, stack: Stack, mlp: Mlp | Experts, h: torch.Tensor, step: Step) -> torch.Tensor:
    if isinstance(mlp, Experts):
        return run_experts(ops, mlp, h, stack.activation)
    return _linear(ops, mlp.down, ops.gated_activation(_linear(ops, mlp.gate_up, h, step), stack.activation), step)


def _linear(ops: Backend, linear: Linear, x: torch.Tensor, step: Step) -> torch.Tensor:
    y = ops.adapted_linear(x, linear.weight, step.slab.views[linear.site], step.batch)
    # After the adapter, since DoRA's gain does not scale the bias.
    return y if linear.bias is None else y.add_(linear.bias)
