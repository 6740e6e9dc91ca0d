"""Forward passes of a base over groups of examples, at low cost in time and memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from loramill.data.encoding import EncodedExample
from loramill.errors import OutOfMemory
from loramill.jobs.train.batching import PackedRows, pack, pad
from loramill.jobs.train.methods.layers import adapted_linear
from loramill.jobs.train.ops import attention
from loramill.jobs.train.ops.layers import layer_forwards
from loramill.jobs.train.ops.log_probs import token_log_probs
from loramill.jobs.train.ops.loss import cross_entropy, cross_entropy_of_head
from loramill.kernels.attention import varlen
from loramill.kernels.device import is_out_of_memory
from loramill.models.catalog import NATIVE_ARCHITECTURES

#: Kinds of layers in a config's `layer_types`, and keys of the masks that transformers takes for them.
_FULL, _SLIDING = "full_attention", "sliding_attention"

#: Messages of the RuntimeError by which torch's CPU allocator reports that memory ran out.
_CPU_OOM_MESSAGES = ("DefaultCPUAllocator: can't allocate memory", "not enough memory: you tried to allocate")


@dataclass(frozen=True, slots=True)
class Predictions:
    """What a part of a pass predicts in place of its supervised tokens.

    Attributes:
        rows: the part.
        states: the logits [S, vocabulary]; or what the head makes them from, [S, d], so that few exist at a time.
        head: the head's frozen weights, [vocabulary, d]; None if `states` are logits.
    """

    rows: PackedRows
    states: torch.Tensor
    head: torch.Tensor | None

    def cross_entropy(self, total_weight: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns what the part adds to the mean loss and accuracy of its batch.

        Args:
            total_weight: sum of the weights of the whole batch.

        Returns:
            Two float32 scalars: the sum of weight / total_weight times the cross-entropy in nats, with a gradient, and
            the sum of weight / total_weight over the tokens that the model predicts as the most likely.
        """
        weights = (self.rows.weights / total_weight).float().to(self.states.device)
        labels = self.rows.labels.to(self.states.device)
        if self.head is None:
            return cross_entropy(self.states, labels, weights)
        return cross_entropy_of_head(self.states, self.head, labels, weights)

    def log_probs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the log-probabilities of the supervised tokens, and whether each is the most likely token.

        Returns:
            float32 [S] in nats, with a gradient, and bool [S].
        """
        return token_log_probs(self.states, self.head, self.rows.labels.to(self.states.device))


def predict(model: Callable[..., Any], base: PreTrainedModel, parts: Sequence[PackedRows]) -> list[Predictions]:
    """Runs one forward pass over some parts, whose tokens attend to their own part alone.

    Args:
        model: called like the base.
        base: the base inside `model`; its head computes logits for the supervised tokens alone.
        parts: several only if `shares_passes(base)`.
    """
    head = frozen_head(base)
    with ExitStack() as stack:
        if head is not None:
            _replace_forward(head, _unchanged, stack)
        states = _logits(model, base, parts)
    pieces = torch.split(states, [len(part.labels) for part in parts])
    weight = None if head is None else head.weight
    return [Predictions(part, piece, weight) for part, piece in zip(parts, pieces, strict=True)]


def loss_and_accuracy(
    model: Callable[..., Any],
    base: PreTrainedModel,
    examples: Sequence[EncodedExample],
    total_weight: float,
    *,
    packing: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs a forward pass over `examples` as one part; returns its `Predictions.cross_entropy`."""
    [predictions] = predict(model, base, [lay_out(examples, base, packing=packing)])
    return predictions.cross_entropy(total_weight)


def lay_out(examples: Sequence[EncodedExample], base: PreTrainedModel, *, packing: bool) -> PackedRows:
    """Lays `examples` out as one part of a pass."""
    return pack(examples, attention_window(base)) if packing else pad(examples)


def supervised_logits(model: Callable[..., Any], base: PreTrainedModel, rows: PackedRows) -> torch.Tensor:
    """Returns the logits of the supervised tokens, float32 [S, vocabulary]; arguments as of `predict`."""
    return _logits(model, base, [rows]).float()


def shares_passes(base: PreTrainedModel) -> bool:
    """Whether parts of several adapters may share a pass: a layout of parts is passed on to the attention."""
    return base.config._attn_implementation == attention.PARTS_NAME or _is_varlen(base)


def attention_window(model: PreTrainedModel) -> int | None:
    """The sliding window of the layers that have one, in tokens; None if no layer has one.

    It is also None if attention takes a mask: masks have the window of each token's position in its example, whatever
    precedes it in the row.
    """
    return getattr(model.config, "sliding_window", None) if _is_varlen(model) else None


def frozen_head(base: PreTrainedModel) -> nn.Linear | None:
    """The head if, on a GPU, logits are nothing but its products with frozen weights; else None."""
    head = base.get_output_embeddings()
    plain = (
        type(base).__name__ in NATIVE_ARCHITECTURES
        and type(head) is nn.Linear
        and head.bias is None
        and not head.weight.requires_grad
        and adapted_linear(head) is None
        and getattr(base.config, "final_logit_softcapping", None) is None
    )
    return head if plain and base.device.type == "cuda" else None


def _unchanged(hidden: torch.Tensor) -> torch.Tensor:
    """The forward of a head that another function replaces."""
    return hidden


def _logits(model: Callable[..., Any], base: PreTrainedModel, parts: Sequence[PackedRows]) -> torch.Tensor:
    tokens, positions = (
        torch.cat([rows.flatten() for rows in each])[None]
        for each in ([part.tokens for part in parts], [part.positions for part in parts])
    )
    attended: dict[str, Any]
    if _is_varlen(base):
        attended = {"attention_mask": None, "row_layout": attention.VarlenLayout.of(parts, base.device)}
    elif shares_passes(base):
        attended = {
            "attention_mask": None,
            "row_layout": attention.PartsLayout(parts, base.dtype == torch.bfloat16),
        }
    else:
        [rows] = parts
        tokens, positions = rows.tokens, rows.positions
        attended = {"attention_mask": _added_masks(rows, base)}
    starts = accumulate((part.tokens.numel() for part in parts), initial=0)
    targets = torch.cat([part.target_positions + start for part, start in zip(parts, starts, strict=False)])
    with _head_on_positions(base, targets.to(base.device)):
        output = model(
            input_ids=tokens.to(base.device), position_ids=positions.to(base.device), use_cache=False, **attended
        )
    logits: torch.Tensor = output.logits
    return logits


def _added_masks(rows: PackedRows, base: PreTrainedModel) -> torch.Tensor | dict[str, torch.Tensor]:
    """What is added to the scores, [R, 1, T, T]: 0 where a token attends to another, else -inf.

    It is one mask for all layers, or one for each kind of layer if some layers have a window that an example exceeds.
    transformers takes such masks as they are, without adding its own window.
    """

    def added(window: int | None) -> torch.Tensor:
        return rows.added_mask(window, base.dtype).to(base.device)

    window = getattr(base.config, "sliding_window", None)
    kinds = set(getattr(base.config, "layer_types", None) or ())
    if type(base).__name__ == "MistralForCausalLM":
        kinds = set()  # its layers all have the window, whatever their types
    if window is None or int(rows.positions.max()) < window or not kinds <= {_FULL, _SLIDING} or kinds == {_FULL}:
        return added(None)
    if _FULL not in kinds:
        return added(window)
    return {_FULL: added(None), _SLIDING: added(window)}


def _is_varlen(model: PreTrainedModel) -> bool:
    return model.config._attn_implementation in attention.VARLEN_NAMES.values()


@contextmanager
def configured_forward(
    model: PreTrainedModel, longest: int, *, masked: bool = False, deterministic: bool = False
) -> Iterator[None]:
    """Within, `model` computes in the fastest way for rows of `longest` tokens; afterwards it is as before.

    Args:
        masked: always give the model a mask.
        deterministic: compute the same bits each time on a GPU, too.
    """
    implementation = _attention(model, longest, masked=masked, deterministic=deterministic)
    with ExitStack() as stack:
        if implementation is not None:
            stack.callback(model.set_attn_implementation, model.config._attn_implementation)
            model.set_attn_implementation(implementation)
        for module, own_forward in layer_forwards(model, model.device):
            _replace_forward(module, own_forward, stack)
        yield


@contextmanager
def recomputed_layers(model: PreTrainedModel, enabled: bool = True) -> Iterator[None]:
    """Within, if `enabled`, each layer's activations are computed again in the backward pass instead of being kept.

    The gradients are the same to the bit, dropout included.
    """
    with ExitStack() as stack:
        for module in model.modules():
            if enabled and isinstance(module, GradientCheckpointingLayer):
                # transformers' own switch works only in train mode, which turns on the base's dropout
                _replace_forward(module, partial(checkpoint, module.forward, use_reentrant=False), stack)
        yield


def _attention(model: PreTrainedModel, longest: int, *, masked: bool, deterministic: bool) -> str | None:
    """The name of the fastest attention for rows of `longest` tokens; None for the model's own.

    On a GPU, scores with a cap, as Gemma 2 has them, are computed by transformers: FlashAttention has none.
    """
    config = model.config
    known = type(model).__name__ in NATIVE_ARCHITECTURES and not masked
    if model.device.type == "cpu":
        return attention.PARTS_NAME if known else None if longest > attention.MAX_EAGER_TOKENS else "eager"
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    fits = known and not capped and varlen.is_supported(model.dtype, head_dim, backward=True)
    return attention.VARLEN_NAMES[deterministic] if fits else None


def _replace_forward(module: nn.Module, forward: Callable[..., Any], stack: ExitStack) -> None:
    module.forward = forward
    stack.callback(module.__delattr__, "forward")


def is_memory_error(error: Exception) -> bool:
    """Whether an error of torch or Python reports that memory ran out."""
    on_cpu = isinstance(error, MemoryError) or any(words in str(error) for words in _CPU_OOM_MESSAGES)
    return on_cpu or is_out_of_memory(error)


@contextmanager
def translate_oom(pass_tokens: int, longest_example: int) -> Iterator[None]:
    """Translates the errors by which torch and Python report that memory ran out.

    Args:
        pass_tokens: tokens of one pass.
        longest_example: tokens of the longest example, and thus of the smallest possible pass.

    Raises:
        OutOfMemory: its message says what to change.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not is_memory_error(error):
            raise
        advice = (
            f"with 'micro_tokens' {pass_tokens // 2} a pass is half as large, for the same result"
            if pass_tokens // 2 >= longest_example
            else "give the job 'gradient_checkpointing', a lower rank, or shorter examples"
        )
        raise OutOfMemory(
            f"No memory for a forward and backward pass of {pass_tokens} tokens ('micro_tokens'; the longest example "
            "has "
            f"{longest_example}): {advice}."
        ) from error


@contextmanager
def _head_on_positions(base: PreTrainedModel, positions: torch.Tensor) -> Iterator[None]:
    """Within, the head computes logits only at these positions of the flattened rows: [positions, vocabulary]."""
    head = base.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, hidden: (hidden[0].flatten(0, 1)[positions],))
    try:
        yield
    finally:
        hook.remove()
