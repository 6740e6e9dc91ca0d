"""The dimensions of a base, from its config.json alone; no weights are read.

They are computed from the numbers of the config for native architectures; others are built by transformers on torch's
meta device, which takes a second and no memory.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

from loramill.errors import BaseUnusable, InvalidRequest
from loramill.models import hub, smollm2
from loramill.models.catalog import NATIVE_ARCHITECTURES
from loramill.models.targets import layer_of
from loramill.models.text_model import TEXT_ARCHITECTURES, text_config

_BILLIONS = re.compile(r"(\d+(?:\.\d+)?)([bm])", re.IGNORECASE)
#: Llama's own sizes, in billions of weights: width, MLP, layers, heads, heads of keys, vocabulary, tied embeddings.
#: 7, 13, 33 and 65 are of Llama 1 and 2; the others of Llama 3.
_LLAMAS = {
    1: (2048, 8192, 16, 32, 8, 128256, True),
    3: (3072, 8192, 28, 24, 8, 128256, True),
    7: (4096, 11008, 32, 32, 32, 32000, False),
    8: (4096, 14336, 32, 32, 8, 128256, False),
    13: (5120, 13824, 40, 40, 40, 32000, False),
    33: (6656, 17920, 60, 52, 52, 32000, False),
    65: (8192, 22016, 80, 64, 64, 32000, False),
    70: (8192, 28672, 80, 64, 8, 128256, False),
    405: (16384, 53248, 126, 128, 8, 128256, False),
}


@dataclass(frozen=True, slots=True)
class LinearShape:
    """A linear of a layer: its full name, such as `model.layers.0.self_attn.q_proj`, and its dimensions."""

    name: str
    layer: int
    d_in: int
    d_out: int

    @property
    def suffix(self) -> str:
        """The last part of the name, by which targets name it."""
        return self.name.rpartition(".")[2]

    @property
    def weights(self) -> int:
        """Number of weights without a bias."""
        return self.d_in * self.d_out


@dataclass(frozen=True, slots=True)
class ExpertsShape:
    """The experts of a mixture of experts, which adapters can't target.

    Attributes:
        layers: number of layers with experts.
        count: number of experts of such a layer.
        top_k: number of experts of a token.
        weights: weights of one expert.
        router_weights: weights of the router of a layer.
    """

    layers: int
    count: int
    top_k: int
    weights: int
    router_weights: int

    def idle_weights(self, tokens: int) -> int:
        """The weights of all experts that a pass over N tokens does not read, if each is chosen as often."""
        return round(self.layers * self.weights * self.count * (1 - self.top_k / self.count) ** tokens)


@dataclass(frozen=True, slots=True)
class Anatomy:
    """The numbers of a base that determine its memory.

    Attributes:
        architecture: the name in config.json.
        layers: number of layers.
        hidden, heads, kv_heads, head_dim, vocabulary: as in config.json.
        intermediate: width of the MLP; of a token's experts together if they are more.
        context: maximum number of tokens.
        linears: the linears of all layers.
        embedding_weights: weights of the embedding and, if it is not tied to that, of the head.
        other_weights: all other weights: norms, biases, routers and experts.
        llama_like: whether the layers are like Llama's (RMS norms, rotary positions, a gated MLP).
        head_norms: whether the queries and keys of each head are normalized.
        experts: None without experts.
        norms: number of norms per layer of the width `hidden`.
        caps_attention, caps_logits: whether attention's scores, or logits, have a cap, as in Gemma 2.
    """

    architecture: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    context: int
    linears: tuple[LinearShape, ...]
    embedding_weights: int
    other_weights: int
    llama_like: bool
    head_norms: bool = False
    experts: ExpertsShape | None = None
    norms: int = 2
    caps_attention: bool = False
    caps_logits: bool = False

    @property
    def parameters(self) -> int:
        """Number of all weights."""
        return sum(linear.weights for linear in self.linears) + self.embedding_weights + self.other_weights

    @property
    def active_parameters(self) -> int:
        """Number of the weights that compute one token: all but the experts that its routers don't choose."""
        return self.parameters - (0 if self.experts is None else self.experts.idle_weights(1))


def anatomy(config: Mapping[str, Any]) -> Anatomy:
    """The anatomy of a base with this config.json.

    Raises:
        BaseUnusable: a number is missing, or transformers does not have such a model.
    """
    return _anatomy(json.dumps(config, sort_keys=True, default=str))


def linears(config: Mapping[str, Any]) -> tuple[LinearShape, ...]:
    """The linears of the layers, in the order of the model; the head is not among them.

    Raises:
        BaseUnusable: as `anatomy`.
    """
    return anatomy(config).linears


def read_config(name: str) -> dict[str, Any]:
    """The config of a local folder or config.json, or of a Llama of a size such as "65B".

    Raises:
        InvalidRequest: it is neither.
        BaseUnusable: the file can't be read.
    """
    path = Path(name).expanduser()
    if path.is_dir() or path.is_file():
        file = path / "config.json" if path.is_dir() else path
        try:
            config = json.loads(file.read_bytes())
        except (OSError, ValueError) as error:
            raise BaseUnusable(f"{file} can't be read as a model's config: {error}.") from error
        if not isinstance(config, dict):
            raise BaseUnusable(f"{file} does not contain a JSON object: give a Hugging Face config.json.")
        return config
    if size := _BILLIONS.fullmatch(name):
        return llama_of(float(size[1]) / (1 if size[2] in "bB" else 1000))
    raise InvalidRequest(
        f"There is no base '{name}' here: give a Hugging Face folder, a config.json, or a size such as 8B.",
        param="base",
    )


def find_config(name: str, cache: Path) -> dict[str, Any]:
    """The config of anything that `read_config` reads, of the built-in base, or of a hub id; downloads no weights.

    Raises:
        InvalidRequest: it is neither.
        BaseUnusable: the file can't be read, or the hub can't be reached.
    """
    if name == smollm2.NAME:
        return read_config(str(smollm2.ensure_converted(cache)))
    if Path(name).expanduser().exists() or "/" not in name:
        return read_config(name)
    return read_config(str(hub.cached_snapshot(name, ["config.json"]) or hub.download_snapshot(name, ["config.json"])))


def llama_of(billions: float) -> dict[str, Any]:
    """The config of the Llama of this size; if there is none, of a model with the proportions of Llama 1.

    These are heads of 128, a width of 128 times the layers, an MLP of 8/3 of the width, a vocabulary of 32,000, and no
    sharing of keys and values, which takes more memory than sharing them.
    """
    if (published := _LLAMAS.get(int(billions))) and billions == int(billions):
        return _llama(*published)
    parameters = billions * 1e9
    heads = bisect_left(range(1, 512), parameters, key=lambda heads: anatomy(_proportioned(heads)).parameters) + 1
    near = _proportioned(max(1, heads - 1)), _proportioned(heads)
    return min(near, key=lambda each: abs(anatomy(each).parameters - parameters))


def _proportioned(heads: int) -> dict[str, Any]:
    hidden = 128 * heads
    return _llama(hidden, -(-hidden * 8 // 3 // 256) * 256, heads, heads, heads, 32000, False)


def _llama(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocabulary: int, tied: bool
) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 131072,
    }


@lru_cache(maxsize=1024)
def _anatomy(text: str) -> Anatomy:
    config = json.loads(text)
    architecture = str(next(iter(config.get("architectures") or ()), "a model without an architecture"))
    if architecture in TEXT_ARCHITECTURES:
        return anatomy(text_config(config))
    if architecture not in NATIVE_ARCHITECTURES:
        return _transformers_anatomy(config, architecture)
    try:
        return _native_anatomy(config, architecture)
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise BaseUnusable(f"The base's config.json lacks {error}, or has no number there; correct it.") from error


def _native_anatomy(config: Mapping[str, Any], architecture: str) -> Anatomy:
    """The anatomy of a native architecture, computed from the numbers of the config."""
    gemma = architecture in ("Gemma2ForCausalLM", "Gemma3ForCausalLM")
    hidden, intermediate = int(config["hidden_size"]), int(config["intermediate_size"])
    layers, heads = int(config["num_hidden_layers"]), int(config["num_attention_heads"])
    kv_heads, head_dim = int(config.get("num_key_value_heads") or heads), int(config.get("head_dim") or hidden // heads)
    q, kv = heads * head_dim, kv_heads * head_dim
    of_attention = {
        "self_attn.q_proj": (hidden, q),
        "self_attn.k_proj": (hidden, kv),
        "self_attn.v_proj": (hidden, kv),
        "self_attn.o_proj": (q, hidden),
    }
    of_mlp = {
        "mlp.gate_proj": (hidden, intermediate),
        "mlp.up_proj": (hidden, intermediate),
        "mlp.down_proj": (intermediate, hidden),
    }
    sparse = _sparse_layers(config) if architecture == "Qwen3MoeForCausalLM" else frozenset[int]()
    experts = _experts(config, len(sparse), hidden) if sparse else None
    attention_bias = config.get("attention_bias") and architecture not in ("MistralForCausalLM", "Qwen2ForCausalLM")
    biases = q + 2 * kv if architecture == "Qwen2ForCausalLM" else (q + 2 * kv + hidden) * bool(attention_bias)
    biases += (2 * intermediate + hidden) * bool(config.get("mlp_bias") and architecture == "LlamaForCausalLM")
    of_heads = architecture in ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "Gemma3ForCausalLM")
    norms = (4 if gemma else 2) * hidden + 2 * head_dim * of_heads
    tied = bool(config.get("tie_word_embeddings", gemma))
    vocabulary, capped = int(config["vocab_size"]), architecture == "Gemma2ForCausalLM"
    return Anatomy(
        architecture=architecture,
        layers=layers,
        hidden=hidden,
        intermediate=_width(intermediate, len(sparse) < layers, experts, hidden),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocabulary=vocabulary,
        context=int(config.get("max_position_embeddings") or 4096),
        linears=tuple(
            LinearShape(f"model.layers.{layer}.{name}", layer, *shape)
            for layer in range(layers)
            for name, shape in (of_attention if layer in sparse else of_attention | of_mlp).items()
        ),
        embedding_weights=vocabulary * hidden * (1 if tied else 2),
        other_weights=layers * (biases + norms) + hidden + (_weights_of(experts) if experts else 0),
        llama_like=True,
        head_norms=of_heads,
        experts=experts,
        norms=4 if gemma else 2,
        caps_attention=capped and config.get("attn_logit_softcapping", 50.0) is not None,
        caps_logits=config.get("final_logit_softcapping", 30.0 if capped else None) is not None,
    )


def _sparse_layers(config: Mapping[str, Any]) -> frozenset[int]:
    """The layers of a Qwen3 MoE that have experts in place of an MLP."""
    every, without = int(config.get("decoder_sparse_step", 1)), config.get("mlp_only_layers") or ()
    layers = range(int(config["num_hidden_layers"]) if _expert_count(config) else 0)
    return frozenset(layer for layer in layers if layer not in without and (layer + 1) % every == 0)


def _expert_count(config: Mapping[str, Any]) -> int:
    return int(config.get("num_experts", config.get("num_local_experts", 128)))


def _experts(config: Mapping[str, Any], layers: int, hidden: int) -> ExpertsShape:
    count = _expert_count(config)
    weights = 3 * hidden * int(config["moe_intermediate_size"])
    return ExpertsShape(layers, count, int(config.get("num_experts_per_tok", 8)), weights, count * hidden)


def _width(intermediate: int, dense: bool, experts: ExpertsShape | None, hidden: int) -> int:
    """The width of the MLP if a layer is dense, or of a token's experts together if they are more."""
    return max(intermediate * dense, experts.top_k * experts.weights // (3 * hidden) if experts else 0)


def _weights_of(experts: ExpertsShape) -> int:
    return experts.layers * (experts.count * experts.weights + experts.router_weights)


def _transformers_anatomy(config: Mapping[str, Any], architecture: str) -> Anatomy:
    """The anatomy of any other causal language model of transformers, built without weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {name: value for name, value in config.items() if name not in ("model_type", "dtype", "torch_dtype")}
    try:
        known = AutoConfig.for_model(config["model_type"], **values)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(known)
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise BaseUnusable(f"transformers can't build {architecture} from its config.json: {error}") from error
    head = model.get_output_embeddings()
    found = tuple(_linears_of(model, head))
    embedding = {id(each.weight): each.weight.numel() for each in (model.get_input_embeddings(), head) if each}
    total = sum(parameter.numel() for parameter in model.parameters())
    hidden, heads = known.hidden_size, known.num_attention_heads
    return Anatomy(
        architecture=architecture,
        layers=known.num_hidden_layers,
        hidden=hidden,
        intermediate=max((linear.d_out for linear in found), default=hidden),
        heads=heads,
        kv_heads=getattr(known, "num_key_value_heads", None) or heads,
        head_dim=getattr(known, "head_dim", None) or hidden // heads,
        vocabulary=known.vocab_size,
        context=getattr(known, "max_position_embeddings", None) or 4096,
        linears=found,
        embedding_weights=sum(embedding.values()),
        other_weights=total - sum(embedding.values()) - sum(linear.weights for linear in found),
        llama_like=False,
    )


def _linears_of(model: Any, head: Any) -> Iterator[LinearShape]:
    for name, module in model.named_modules():
        layer = layer_of(name)
        weight = getattr(module, "weight", None)
        if module is head or layer is None or weight is None or type(module).__name__ not in ("Linear", "Conv1D"):
            continue
        d_out, d_in = weight.shape if type(module).__name__ == "Linear" else reversed(weight.shape)
        if prod(weight.shape):
            yield LinearShape(name, layer, d_in, d_out)
