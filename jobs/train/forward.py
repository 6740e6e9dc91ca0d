"""Forward passes of a base over groups of examples, and how they are made cheap."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from loramill.data.tokenizer import EncodedExample
from loramill.errors import OutOfMemory
from loramill.jobs.train.batching import PackedRows, pack, pad
from loramill.jobs.train.ops import attention
from loramill.jobs.train.ops.loss import cross_entropy
from loramill.jobs.train.ops.norm import rms_norm
from loramill.models.catalog import NATIVE_ARCHITECTURES

#: Up to this many tokens a row, plain matrix products beat torch's fused attention on a CPU (1.3x a step).
MAX_EAGER_TOKENS = 512

#: How torch's own allocator of a CPU says that there is no memory: as a RuntimeError like any other.
_CPU_OOM_MESSAGES = ("DefaultCPUAllocator: can't allocate memory", "not enough memory: you tried to allocate")


def loss_and_accuracy(
    model: Callable[..., Any],
    base: PreTrainedModel,
    examples: Sequence[EncodedExample],
    total_weight: float,
    *,
    packing: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One forward pass: what `examples` add to the mean loss and accuracy of a batch whose weights sum to `total`.

    Args:
        model: called as the base is.
        base: what it is made of; logits are computed for the supervised tokens alone.

    Returns:
        The sums of weight / total times the cross-entropy in nats (float32, with a gradient), and times 1 where the
        token is the likeliest one: float32 scalars on the base's device.
    """
    rows = pack(examples) if packing else pad(examples)
    weights = (rows.weights / total_weight).float()
    return cross_entropy(_logits(model, base, rows), rows.labels.to(base.device), weights.to(base.device))


def supervised_logits(model: Callable[..., Any], base: PreTrainedModel, rows: PackedRows) -> torch.Tensor:
    """The logits of the supervised tokens alone, float32 [S, vocabulary]; `model` and `base` as for `losses`."""
    return _logits(model, base, rows).float()


def _logits(model: Callable[..., Any], base: PreTrainedModel, rows: PackedRows) -> torch.Tensor:
    mask = torch.zeros(rows.attention_mask.shape, dtype=base.dtype).masked_fill(~rows.attention_mask, -math.inf)
    with _head_on_positions(base, rows.target_positions.to(base.device)):
        output = model(
            input_ids=rows.tokens.to(base.device),
            position_ids=rows.positions.to(base.device),
            attention_mask=mask[:, None].to(base.device),
            use_cache=False,
        )
    logits: torch.Tensor = output.logits
    return logits


@contextmanager
def configured_forward(model: PreTrainedModel, longest: int, *, checkpointing: bool) -> Iterator[None]:
    """Makes `model` compute in the way that is fastest for rows of `longest` tokens; afterwards it is as before.

    Args:
        checkpointing: whether a layer's activations are computed again in the backward pass, not kept: the same
            gradients to the bit, dropout included.
    """
    known = type(model).__name__ in NATIVE_ARCHITECTURES
    with ExitStack() as stack:
        if model.device.type == "cpu" and longest <= MAX_EAGER_TOKENS:
            stack.callback(model.set_attn_implementation, model.config._attn_implementation)
            model.set_attn_implementation(attention.IMPLEMENTATION_NAME if known else "eager")
        for module in model.modules():
            if known and _is_frozen_norm(module):
                _replace_forward(module, partial(rms_norm, module), stack)
            if checkpointing and isinstance(module, GradientCheckpointingLayer):
                # transformers' own switch works in train mode alone, which turns on the base's dropout
                _replace_forward(module, partial(checkpoint, module.forward, use_reentrant=False), stack)
        yield


def _is_frozen_norm(module: nn.Module) -> bool:
    return (
        type(module).__name__.endswith("RMSNorm")
        and module.weight.device.type == "cpu"
        and not module.weight.requires_grad
    )


def _replace_forward(module: nn.Module, forward: Callable[..., Any], stack: ExitStack) -> None:
    module.forward = forward
    stack.callback(module.__delattr__, "forward")


@contextmanager
def translate_oom(pass_tokens: int, longest_example: int) -> Iterator[None]:
    """Tells that memory ran out, whoever ran out of it, in passes of `limit` tokens.

    Args:
        smallest: tokens of the longest example, which a pass can't be smaller than.

    Raises:
        OutOfMemory: with what is next.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if type(error) is RuntimeError and not any(words in str(error) for words in _CPU_OOM_MESSAGES):
            raise
        following = (
            f"with 'micro_tokens' {pass_tokens // 2} a pass is half as large, for the same result"
            if pass_tokens // 2 >= longest_example
            else "give the job 'gradient_checkpointing', a lower rank, or shorter examples"
        )
        raise OutOfMemory(
            f"No memory for a forward and backward pass of {pass_tokens} tokens ('micro_tokens'; the longest example "
            "has "
            f"{longest_example}): {following}."
        ) from error


@contextmanager
def _head_on_positions(base: PreTrainedModel, positions: torch.Tensor) -> Iterator[None]:
    """Within, the head sees only these of all rows' places: logits are [places, vocabulary]."""
    head = base.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, hidden: (hidden[0].flatten(0, 1)[positions],))
    try:
        yield
    finally:
        hook.remove()
