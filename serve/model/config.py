"""A base's config.json, as the decoder understands it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loramill.errors import BaseUnusable

#: Which linears of an architecture have a bias whatever its config says.
_BIASED = {
    "LlamaForCausalLM": (),
    "MistralForCausalLM": (),
    "Qwen2ForCausalLM": ("q_proj", "k_proj", "v_proj"),
    "Qwen3ForCausalLM": (),
}
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
_ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embedding: `kind` is default, linear or llama3; `factors` holds that kind's numbers by name."""

    theta: float
    kind: str
    factors: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """Shapes and switches of one decoder; `context_length` in tokens."""

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


def read_config(folder: Path) -> DecoderConfig:
    """Reads `config.json`, as transformers 4 and 5 write it.

    Raises:
        BaseUnusable: no readable config, another architecture, or a feature that the decoder lacks.
    """
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BaseUnusable(f"{path} can't be read ({error}); the folder must hold a Hugging Face model.") from error
    if not isinstance(raw, dict):
        raise BaseUnusable(f"{path} is no JSON object; the folder must hold a Hugging Face model.")
    try:
        return _parse(raw, path)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise BaseUnusable(f"{path} lacks or garbles a field: {error!r}.") from error


def _parse(raw: dict[str, Any], path: Path) -> DecoderConfig:
    architecture = str((raw.get("architectures") or ["none named"])[0])
    if architecture not in _BIASED:
        raise BaseUnusable(f"{path}: architecture {architecture}; the engine serves {', '.join(_BIASED)}.")
    context = int(raw["max_position_embeddings"])
    _refuse_unknown_features(raw, context, path)
    heads = int(raw["num_attention_heads"])
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
        head_dim=int(raw.get("head_dim") or int(raw["hidden_size"]) // heads),
        context_length=context,
        norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        tied=bool(raw.get("tie_word_embeddings", False)),
        qk_norm=architecture == "Qwen3ForCausalLM",
        biased=frozenset(biased),
        rope=_parse_rope(raw, context, path),
    )


def _refuse_unknown_features(raw: dict[str, Any], context: int, path: Path) -> None:
    if raw.get("hidden_act", "silu") != "silu":
        raise BaseUnusable(f"{path}: hidden_act {raw['hidden_act']}; the engine knows silu.")
    if raw.get("quantization_config"):
        raise BaseUnusable(f"{path}: the weights are quantized; the engine reads bfloat16, float16 or float32.")
    # Mistral has a window unless its config says null; Qwen has one where a switch or a layer's type says so.
    mistral = raw["architectures"][0] == "MistralForCausalLM"
    window = raw.get("sliding_window", 4096 if mistral else None)
    used = mistral or raw.get("use_sliding_window") or "sliding_attention" in (raw.get("layer_types") or ())
    if window is not None and used and int(window) < context:
        raise BaseUnusable(
            f"{path}: a sliding window of {window} tokens in a context of {context}, which the engine lacks; "
            f"set max_position_embeddings to {window} to serve within the window."
        )


def _parse_rope(raw: dict[str, Any], context: int, path: Path) -> Rope:
    fields = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
    kind = str(fields.get("rope_type", fields.get("type", "default")))
    partial = fields.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))
    if kind not in _ROPE_KEYS or partial != 1.0:
        raise BaseUnusable(f"{path}: rope {fields}; the engine knows {', '.join(_ROPE_KEYS)} over whole heads.")
    factors = {key: float(fields[key]) for key in _ROPE_KEYS[kind]}
    if kind == "llama3":
        factors["original_context"] = float(fields.get("original_max_position_embeddings", context))
    return Rope(float(fields.get("rope_theta", raw.get("rope_theta", 10000.0))), kind, factors)
