"""The layers of transformers' models that compute by this package's operations while a job trains.

They are recognized by the names of their classes, whose forward functions were read in transformers 5.23: Llama (also
SmolLM2), Mistral, Qwen 2 and 3, Qwen 3's mixture of experts, Gemma 2 and 3. Other layers keep their forward functions,
which is logged once per class.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from subprocess import CalledProcessError
from types import FunctionType
from typing import Any

import torch
from torch import nn

from loramill.jobs.train.ops import native
from loramill.jobs.train.ops.norm import rms_norm
from loramill.kernels.products import computes_in_float32, frozen_linear
from loramill.kernels.training import native_library

log = logging.getLogger(__name__)

_LLAMA_LIKE = ("Llama", "Mistral", "Qwen2", "Qwen3", "Qwen3Moe")
_GEMMA = ("Gemma2", "Gemma3")

#: Norms that multiply by their weight in the dtype of x, and those that multiply by 1 + weight in float32.
_NORMS = frozenset(f"{family}RMSNorm" for family in _LLAMA_LIKE)
_PLUS_ONE_NORMS = frozenset(f"{family}RMSNorm" for family in _GEMMA)
#: MLPs that compute down_proj(act_fn(gate_proj(x)) * up_proj(x)).
_MLPS = frozenset(f"{family}MLP" for family in (*_LLAMA_LIKE, *_GEMMA))
#: Attention that rotates queries and keys by `apply_rotary_pos_emb`, with the same angles in both halves of a head.
_ATTENTIONS = frozenset(f"{family}Attention" for family in (*_LLAMA_LIKE, *_GEMMA))
_ROTARY = "apply_rotary_pos_emb"
#: Classes of activations, and whether they are GELU in its tanh approximation instead of SiLU.
_ACTIVATIONS = {"SiLU": False, "SiLUActivation": False, "GELUTanh": True}

Forward = Callable[..., Any]


def layer_forwards(model: nn.Module, device: torch.device) -> Iterator[tuple[nn.Module, Forward]]:
    """Yields layers of a model and the forward functions to give them, which compute the same.

    Args:
        model: a causal language model of transformers.
        device: where it computes.
    """
    if device.type == "cpu":
        yield from _cpu_forwards(model)
    elif (problem := triton_problem(device)) is None:
        yield from fused_forwards(model)
    else:
        _log_once(f"Triton fails, so training uses transformers' norms, MLPs and rotary positions: {problem}")


@lru_cache
def triton_problem(device: torch.device) -> str | None:
    """Why Triton's kernels can't run on a GPU, such as a missing C compiler; None if they can."""
    try:
        from loramill.jobs.train.ops import fused

        fused.launch_once(device)
    except (torch.AcceleratorError, torch.OutOfMemoryError):
        raise
    except (ImportError, OSError, RuntimeError, CalledProcessError) as error:
        return str(error)
    return None


def _cpu_forwards(model: nn.Module) -> Iterator[tuple[nn.Module, Forward]]:
    dtypes = {
        each.dtype for each in model.parameters() if each.is_floating_point()
    }  # codes of a quantized base are not
    fast = dtypes == {torch.bfloat16} and native_library(torch.device("cpu"), torch.bfloat16) is not None
    for module in model.modules():
        forward = _linear_in_float32(module)
        if forward is None and fast:
            forward = _native_norm(module) or _native_mlp(module) or _with_rotary(module, native.apply_rotary)
        if forward is not None:
            yield module, forward
        elif type(module).__name__ in _NORMS and _is_frozen(module):
            yield module, partial(rms_norm, module)


def _linear_in_float32(module: Any) -> Forward | None:
    """`frozen_linear`, if it is faster than a linear's own forward function; None for a linear with adapters."""
    plain = type(module) is nn.Linear and module.weight.dtype == torch.bfloat16 and "forward" not in vars(module)
    slow = plain and _is_frozen(module) and computes_in_float32(module.weight.dtype)
    return partial(frozen_linear, weight=module.weight, bias=module.bias) if slow else None


def _native_norm(module: Any) -> Forward | None:
    norm = _norm_of(module)
    return None if norm is None else partial(native.rms_norm, **norm)


def _native_mlp(module: Any) -> Forward | None:
    silu = type(module).__name__ in _MLPS and _ACTIVATIONS.get(type(module.act_fn).__name__) is False
    return partial(native.gated_mlp, module) if silu else None


def fused_forwards(model: nn.Module) -> Iterator[tuple[nn.Module, Forward]]:
    """`layer_forwards` on a GPU: norms with frozen weights, gated MLPs, and rotary positions, by Triton kernels."""
    for module in model.modules():
        name = type(module).__name__
        if not name.endswith(("Norm", "MLP", "Attention")):
            continue
        forward = _fused_norm(module) or _fused_mlp(module) or _fused_attention(module)
        if forward is not None:
            yield module, forward
        elif _is_frozen(module):
            _log_once(f"no fused kernel for {name}: training uses transformers' own")


def _fused_norm(module: Any) -> Forward | None:
    from loramill.jobs.train.ops import fused

    norm = _norm_of(module)
    return None if norm is None else partial(fused.rms_norm, **norm)


def _norm_of(module: Any) -> dict[str, Any] | None:
    """The arguments of an RMS norm besides x; None if the module is not one, or its weight is trained."""
    name = type(module).__name__
    if name not in _NORMS | _PLUS_ONE_NORMS or not _is_frozen(module):
        return None
    plus_one = name in _PLUS_ONE_NORMS
    return {
        "weight": module.weight,
        "eps": module.eps if plus_one else module.variance_epsilon,
        "plus_one": plus_one,
    }


def _fused_mlp(module: Any) -> Forward | None:
    from loramill.jobs.train.ops import fused

    if type(module).__name__ not in _MLPS:
        return None
    gelu = _ACTIVATIONS.get(type(module.act_fn).__name__)
    return None if gelu is None else partial(fused.gated_mlp, module, gelu=gelu)


def _fused_attention(module: nn.Module) -> Forward | None:
    from loramill.jobs.train.ops import fused

    return _with_rotary(module, fused.apply_rotary)


def _with_rotary(module: nn.Module, apply_rotary: Callable[..., Any]) -> Forward | None:
    """The own forward function of an attention layer, with `apply_rotary_pos_emb` replaced."""
    own = type(module).forward
    if type(module).__name__ not in _ATTENTIONS or _ROTARY not in own.__code__.co_names:
        return None
    names = own.__globals__ | {_ROTARY: apply_rotary}
    copy = FunctionType(own.__code__, names, own.__name__, own.__defaults__, own.__closure__)
    copy.__kwdefaults__ = own.__kwdefaults__
    return partial(copy, module)


def _is_frozen(module: nn.Module) -> bool:
    return not any(parameter.requires_grad for parameter in module.parameters(recurse=False))


@lru_cache
def _log_once(message: str) -> None:
    log.warning(message)
