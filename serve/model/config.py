"""Reads a base's config.json for the decoder."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loramill.errors import BaseUnusable
from loramill.kernels.backend import Activation

_GEMMA = ("Gemma2ForCausalLM", "Gemma3ForCausalLM")
#: What the decoder supports: `loramill.models.catalog.NATIVE_ARCHITECTURES`, which this package does not import.
ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
    *_GEMMA,
)
_QK_NORMED = ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "Gemma3ForCausalLM")
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
#: Largest head_dim that the kernels support.
_MAX_HEAD_DIM = 256
_MLP = ("gate_proj", "up_proj", "down_proj")
#: Kinds of attention in `layer_types`.
_FULL, _SLIDING = "full_attention", "sliding_attention"
#: Required numbers of each kind of rope.
_ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": (),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}


@dataclass(frozen=True, slots=True)
class Rope:
    """A rotary embedding.

    Attributes:
        theta: Base of the frequencies.
        kind: default, linear, dynamic, yarn or llama3.
        factors: The kind's numbers by name.
    """

    theta: float
    kind: str
    factors: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class ExpertsConfig:
    """The experts of a mixture-of-experts model.

    Attributes:
        count: Number of experts of a layer.
        intermediate: Width of an expert.
        top_k: Number of experts of a token.
        normalized: Whether the weights of a token's experts are divided by their sum.
        layers: For each layer, whether it has experts in place of an MLP.
    """

    count: int
    intermediate: int
    top_k: int
    normalized: bool
    layers: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """Shapes and features of one decoder.

    Attributes:
        vocabulary: Number of tokens in the vocabulary.
        context_length: Maximum number of tokens of a sequence.
        tied: Whether the head has the embedding's weight.
        qk_norm: Whether queries and keys are normalized per head.
        biased: Names of the linears with a bias.
        windows: For each layer, the number of positions that a row sees, including its own; None: all.
        local_rope: The rope of layers with a window; None: all layers have the same.
        experts: None if each layer has an MLP.
        activation: The activation of the gates.
        norm_offset: A number that is added to the weights of all norms.
        output_norms: Whether the outputs of attention and MLP are normalized before they are added.
        embedding_scale: Factor of the embeddings.
        attention_scale: Factor of the scores of attention.
        attention_cap: Scores become `cap * tanh(score / cap)`; None: they are not capped.
        head_cap: Likewise for logits.
    """

    architecture: str
    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    context_length: int
    norm_eps: float
    tied: bool
    qk_norm: bool
    biased: frozenset[str]
    rope: Rope
    windows: tuple[int | None, ...]
    local_rope: Rope | None
    experts: ExpertsConfig | None
    activation: Activation
    norm_offset: float
    output_norms: bool
    embedding_scale: float
    attention_scale: float
    attention_cap: float | None
    head_cap: float | None


def read_config(folder: Path) -> DecoderConfig:
    """Reads `config.json` in the formats of transformers 4 and 5.

    Raises:
        BaseUnusable: The config is not readable, or the architecture or a feature is not supported.
    """
    path = folder / "config.json"
    raw = read_raw_config(folder)
    try:
        return _parse(raw, path)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise BaseUnusable(f"A field in {path} is missing or malformed: {error!r}.") from error


def read_raw_config(folder: Path) -> dict[str, Any]:
    """The content of `config.json`.

    Raises:
        BaseUnusable: It is missing, not readable, or not a JSON object.
    """
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BaseUnusable(f"{path} can't be read ({error}); the folder must hold a Hugging Face model.") from error
    if not isinstance(raw, dict):
        raise BaseUnusable(f"{path} is not a JSON object; the folder must hold a Hugging Face model.")
    return raw


def _parse(raw: dict[str, Any], path: Path) -> DecoderConfig:
    architecture = str((raw.get("architectures") or ["none named"])[0])
    if architecture not in ARCHITECTURES:
        raise BaseUnusable(f"{path}: architecture {architecture}; the decoder supports {', '.join(ARCHITECTURES)}.")
    context = int(raw["max_position_embeddings"])
    gemma = architecture in _GEMMA
    _refuse_unknown_features(raw, gemma, path)
    heads = int(raw["num_attention_heads"])
    head_dim = int(raw.get("head_dim") or int(raw["hidden_size"]) // heads)
    if head_dim % 2 or head_dim > _MAX_HEAD_DIM:
        raise BaseUnusable(f"{path}: head_dim {head_dim}; the decoder supports even ones up to {_MAX_HEAD_DIM}.")
    layers = int(raw["num_hidden_layers"])
    rope, local_rope = _parse_ropes(raw, context, path)
    return DecoderConfig(
        architecture=architecture,
        vocabulary=int(raw["vocab_size"]),
        hidden=int(raw["hidden_size"]),
        intermediate=int(raw["intermediate_size"]),
        layers=layers,
        heads=heads,
        kv_heads=int(raw.get("num_key_value_heads") or heads),
        head_dim=head_dim,
        context_length=context,
        norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        tied=bool(raw.get("tie_word_embeddings", gemma)),
        qk_norm=architecture in _QK_NORMED,
        biased=_parse_biased(raw, architecture),
        rope=rope,
        windows=_parse_windows(raw, path),
        local_rope=local_rope,
        experts=_parse_experts(raw, layers) if architecture == "Qwen3MoeForCausalLM" else None,
        activation="gelu_tanh" if gemma else "silu",
        norm_offset=1.0 if gemma else 0.0,
        output_norms=gemma,
        embedding_scale=float(raw["hidden_size"]) ** 0.5 if gemma else 1.0,
        attention_scale=float(raw.get("query_pre_attn_scalar", 256) if gemma else head_dim) ** -0.5,
        attention_cap=_parse_cap(raw, "attn_logit_softcapping", 50.0) if architecture == "Gemma2ForCausalLM" else None,
        head_cap=_parse_cap(raw, "final_logit_softcapping", 30.0 if architecture == "Gemma2ForCausalLM" else None),
    )


def _refuse_unknown_features(raw: dict[str, Any], gemma: bool, path: Path) -> None:
    # Gemma 2's first configs have both keys, of which transformers reads the second.
    key, known = ("hidden_activation", "gelu_pytorch_tanh") if gemma else ("hidden_act", "silu")
    if (raw.get(key) or known) != known:
        raise BaseUnusable(f"{path}: {key} {raw[key]}; the decoder supports {known}.")
    if raw.get("use_bidirectional_attention"):
        raise BaseUnusable(f"{path}: use_bidirectional_attention; the decoder supports causal attention.")
    if raw.get("quantization_config"):
        raise BaseUnusable(f"{path}: the weights are quantized; loramill reads bfloat16, float16 or float32.")


def _parse_biased(raw: dict[str, Any], architecture: str) -> frozenset[str]:
    biased = set(_ATTENTION[:3] if architecture == "Qwen2ForCausalLM" else ())
    if raw.get("attention_bias") and architecture not in ("MistralForCausalLM", "Qwen2ForCausalLM"):
        biased.update(_ATTENTION)
    if raw.get("mlp_bias") and architecture == "LlamaForCausalLM":
        biased.update(_MLP)
    return frozenset(biased)


def _parse_cap(raw: dict[str, Any], key: str, default: float | None) -> float | None:
    cap = raw.get(key, default)
    return None if cap is None else float(cap)


def _parse_experts(raw: dict[str, Any], layers: int) -> ExpertsConfig | None:
    count = int(raw.get("num_experts", raw.get("num_local_experts", 128)))
    every, without = int(raw.get("decoder_sparse_step", 1)), raw.get("mlp_only_layers") or ()
    sparse = tuple(count > 0 and layer not in without and (layer + 1) % every == 0 for layer in range(layers))
    if not any(sparse):
        return None
    return ExpertsConfig(
        count=count,
        intermediate=int(raw["moe_intermediate_size"]),
        top_k=int(raw.get("num_experts_per_tok", 8)),
        normalized=bool(raw.get("norm_topk_prob", False)),
        layers=sparse,
    )


def _parse_windows(raw: dict[str, Any], path: Path) -> tuple[int | None, ...]:
    layers = int(raw["num_hidden_layers"])
    architecture = raw["architectures"][0]
    window = raw.get("sliding_window", 4096)
    if architecture == "MistralForCausalLM":
        # A window unless the config has null, at every layer whatever its `layer_types`.
        return (None if window is None else int(window),) * layers
    if architecture == "LlamaForCausalLM":
        return (None,) * layers
    kinds = raw.get("layer_types")
    if architecture in _GEMMA:
        every = 2 if architecture == "Gemma2ForCausalLM" else int(raw.get("sliding_window_pattern", 6))
        kinds = [_SLIDING if (layer + 1) % every else _FULL for layer in range(layers)] if kinds is None else kinds
    else:
        window = window if raw.get("use_sliding_window") else None
        if architecture == "Qwen3MoeForCausalLM":
            return (None if window is None else int(window),) * layers
        if kinds is None:
            first = layers if window is None else int(raw.get("max_window_layers", 28))
            kinds = [_FULL] * min(first, layers) + [_SLIDING] * (layers - first)
    if len(kinds) != layers or set(kinds) - {_FULL, _SLIDING} or (_SLIDING in kinds and window is None):
        raise BaseUnusable(
            f"{path}: layer_types {kinds} of {layers} layers with a window of {window}; the decoder supports "
            f"{_FULL} or {_SLIDING} for each layer, the latter with a window."
        )
    return tuple(int(window) if kind == _SLIDING and window is not None else None for kind in kinds)


def _parse_ropes(raw: dict[str, Any], context: int, path: Path) -> tuple[Rope, Rope | None]:
    """The rope of all layers, or that of layers without a window and that of layers with one."""
    fields = dict(raw.get("rope_scaling") or raw.get("rope_parameters") or {})
    if raw["architectures"][0] != "Gemma3ForCausalLM":
        return _parse_rope(raw, fields, 10000.0, context, path), None
    by_kind = raw.get("rope_parameters") or {}
    full, local = dict(by_kind.get(_FULL) or raw.get("rope_scaling") or {}), dict(by_kind.get(_SLIDING) or {})
    local.setdefault("rope_theta", raw.get("rope_local_base_freq", 10000.0))
    return _parse_rope(raw, full, 1_000_000.0, context, path), _parse_rope(raw, local, 10000.0, context, path)


def _parse_rope(raw: dict[str, Any], fields: dict[str, Any], theta: float, context: int, path: Path) -> Rope:
    kind = str(fields.get("rope_type", fields.get("type", "default")))
    partial = fields.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    if kind not in _ROPE_KEYS or partial not in (None, 1.0):
        raise BaseUnusable(f"{path}: rope {fields}; the decoder supports {', '.join(_ROPE_KEYS)} over whole heads.")
    factors = {key: float(fields[key]) for key in _ROPE_KEYS[kind]}
    if kind in ("llama3", "yarn"):
        original = raw.get("original_max_position_embeddings") or fields.get("original_max_position_embeddings")
        factors["original_context"] = float(original or context)
    if kind == "yarn":
        factors |= _yarn(fields, context / factors["original_context"])
    return Rope(float(fields.get("rope_theta", raw.get("rope_theta", theta))), kind, factors)


def _yarn(fields: dict[str, Any], stretch: float) -> dict[str, float]:
    # YaRN (Peng et al. 2023): section 3.2 for beta_fast and beta_slow (alpha and beta there), section 3.4 for the
    # attention factor (1 / sqrt(t) there); mscale and mscale_all_dim are DeepSeek's.
    def growth(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    factor = float(fields.get("factor") or stretch)
    over, under = fields.get("mscale"), fields.get("mscale_all_dim")
    attention = fields.get("attention_factor")
    if attention is None:
        attention = growth(over) / growth(under) if over and under else growth(1.0)
    return {
        "factor": factor,
        "attention_factor": float(attention),
        "beta_fast": float(fields.get("beta_fast") or 32),
        "beta_slow": float(fields.get("beta_slow") or 1),
        "truncate": float(fields.get("truncate", True)),
    }
