"""Reads a base's config.json for the decoder."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loramill.errors import BaseUnusable

#: The linears of each supported architecture that always have a bias.
_BIASED = {
    "LlamaForCausalLM": (),
    "MistralForCausalLM": (),
    "Qwen2ForCausalLM": ("q_proj", "k_proj", "v_proj"),
    "Qwen3ForCausalLM": (),
}
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
#: Largest head_dim that the kernels support.
_MAX_HEAD_DIM = 256
_MLP = ("gate_proj", "up_proj", "down_proj")
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
class DecoderConfig:
    """Shapes and features of one decoder.

    Attributes:
        vocabulary: Number of tokens in the vocabulary.
        context_length: Maximum number of tokens of a sequence.
        tied: Whether the head has the embedding's weight.
        qk_norm: Whether queries and keys are normalized per head.
        biased: Names of the linears with a bias.
        windows: For each layer, the number of positions that a row sees, including its own; None: all.
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
    if architecture not in _BIASED:
        raise BaseUnusable(f"{path}: architecture {architecture}; the decoder supports {', '.join(_BIASED)}.")
    context = int(raw["max_position_embeddings"])
    _refuse_unknown_features(raw, path)
    heads = int(raw["num_attention_heads"])
    head_dim = int(raw.get("head_dim") or int(raw["hidden_size"]) // heads)
    if head_dim % 2 or head_dim > _MAX_HEAD_DIM:
        raise BaseUnusable(f"{path}: head_dim {head_dim}; the decoder supports even ones up to {_MAX_HEAD_DIM}.")
    biased = set(_BIASED[architecture])
    if raw.get("attention_bias") and architecture in ("LlamaForCausalLM", "Qwen3ForCausalLM"):
        biased.update(_ATTENTION)
    if raw.get("mlp_bias") and architecture == "LlamaForCausalLM":
        biased.update(_MLP)
    return DecoderConfig(
        architecture=architecture,
        vocabulary=int(raw["vocab_size"]),
        hidden=int(raw["hidden_size"]),
        intermediate=int(raw["intermediate_size"]),
        layers=int(raw["num_hidden_layers"]),
        heads=heads,
        kv_heads=int(raw.get("num_key_value_heads") or heads),
        head_dim=head_dim,
        context_length=context,
        norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        tied=bool(raw.get("tie_word_embeddings", False)),
        qk_norm=architecture == "Qwen3ForCausalLM",
        biased=frozenset(biased),
        rope=_parse_rope(raw, context, path),
        windows=_parse_windows(raw, path),
    )


def _refuse_unknown_features(raw: dict[str, Any], path: Path) -> None:
    if raw.get("hidden_act", "silu") != "silu":
        raise BaseUnusable(f"{path}: hidden_act {raw['hidden_act']}; the decoder supports silu.")
    if raw.get("quantization_config"):
        raise BaseUnusable(f"{path}: the weights are quantized; loramill reads bfloat16, float16 or float32.")


def _parse_windows(raw: dict[str, Any], path: Path) -> tuple[int | None, ...]:
    layers = int(raw["num_hidden_layers"])
    architecture = raw["architectures"][0]
    if architecture == "MistralForCausalLM":
        # A window unless the config has null, at every layer whatever its `layer_types`.
        window = raw.get("sliding_window", 4096)
        return (None if window is None else int(window),) * layers
    if architecture not in ("Qwen2ForCausalLM", "Qwen3ForCausalLM"):
        return (None,) * layers
    window = raw.get("sliding_window", 4096) if raw.get("use_sliding_window") else None
    kinds = raw.get("layer_types")
    if kinds is None:
        first = layers if window is None else int(raw.get("max_window_layers", 28))
        kinds = ["full_attention"] * min(first, layers) + ["sliding_attention"] * (layers - first)
    sliding = "sliding_attention"
    if len(kinds) != layers or set(kinds) - {"full_attention", sliding} or (sliding in kinds and window is None):
        raise BaseUnusable(
            f"{path}: layer_types {kinds} of {layers} layers with a window of {window}; the decoder supports "
            f"full_attention or {sliding} for each layer, the latter with a window."
        )
    return tuple(int(window) if kind == sliding and window is not None else None for kind in kinds)


def _parse_rope(raw: dict[str, Any], context: int, path: Path) -> Rope:
    fields = dict(raw.get("rope_scaling") or raw.get("rope_parameters") or {})
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
    return Rope(float(fields.get("rope_theta", raw.get("rope_theta", 10000.0))), kind, factors)


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
